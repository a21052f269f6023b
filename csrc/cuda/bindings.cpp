// Python's door to the CUDA core: addresses and the stream come in as integers, nothing is checked and nothing is owned
// here. A launch that fails is a RuntimeError. Importing the module needs no driver: the runtime is linked statically and
// touches the driver at the first launch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

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

template <class T>
T to_native(typename FromPython<T>::type value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return value;
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
  m.def("covariance_stats", raw(cuda::covariance_stats));
  m.def("merge_covariance_stats", raw(cuda::merge_covariance_stats));
  m.def("logit_covariance_grad", raw(cuda::logit_covariance_grad));
}
