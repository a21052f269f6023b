// advise_huge_pages() of ../kernels.h.
#include "../kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace entcov::cpu {

void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // errors are ignored
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace entcov::cpu
