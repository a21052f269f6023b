// Python's door to the CUDA core: addresses and the stream come in as integers, nothing is checked and nothing is owned
// here. A launch that fails is a RuntimeError. Importing the module needs no driver: the runtime is linked statically and
// touches the driver at the first launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "entcov_cuda.h"

namespace py = pybind11;

namespace {

template <class T>
struct FromPython {
  using type = T;
};
template <class T>
struct FromPython<T*> {
  using type = uintptr_t;  // Tensor.data_ptr() or Stream.cuda_stream; 0 is a null pointer, or the default stream
};
template <>
struct FromPython<entcov::cuda::HeaderWords> {
  using type = std::vector<int64_t>;
};

template <class T>
T to_native(const typename FromPython<T>::type& value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else if constexpr (std::is_same_v<T, entcov::cuda::HeaderWords>) {
    T header{};
    if (value.size() > T::kMost) throw std::length_error("entcov: too many words for a header");
    std::copy(value.begin(), value.end(), header.words);
    header.count = static_cast<int>(value.size());
    return header;
  } else {
    return value;
  }
}

template <class... A>
auto raw(cudaError_t (*launch)(A...)) {
  return [launch](typename FromPython<A>::type... args) {
    py::gil_scoped_release unlocked;
    if (launch(to_native<A>(args)...) != cudaSuccess)
      throw std::runtime_error(std::string("entcov: ") + entcov::cuda::launch_error());
  };
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  namespace cuda = entcov::cuda;
  m.def("segments", &cuda::segments);
  m.def("row_stats", raw(cuda::row_stats));
  m.def("merge_row_stats", raw(cuda::merge_row_stats));
  m.def("logits_grad", raw(cuda::logits_grad));
  m.def("clamped_stats", raw(cuda::clamped_stats));
  m.def("clamp_sketch", raw(cuda::clamp_sketch));
  m.def("clamp_guess", raw(cuda::clamp_guess));
  m.def("clamp_part", raw(cuda::clamp_part));
  m.def("clamp_narrow", raw(cuda::clamp_narrow));
  m.def("covariance_stats", raw(cuda::covariance_stats));
  m.def("merge_covariance_stats", raw(cuda::merge_covariance_stats));
  m.def("logit_covariance_grad", raw(cuda::logit_covariance_grad));
  m.def("checksum", raw(cuda::checksum));
  m.def("shard_message", raw(cuda::shard_message));
  m.def("accept_shards", raw(cuda::accept_shards));
}
