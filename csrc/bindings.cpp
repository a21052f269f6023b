// Python's door to the CPU core: addresses come in as integers, nothing is checked and nothing is owned here.
// The only file that includes Python. An op is one line: raw() derives its signature from the launcher's.
#include <pybind11/pybind11.h>

#include "entcov.h"

namespace py = pybind11;

namespace {

template <class T>
struct FromPython {
  using type = T;
};
template <class T>
struct FromPython<T*> {
  using type = uintptr_t;  // Tensor.data_ptr(); 0 is a null pointer
};

template <class T>
T to_native(typename FromPython<T>::type value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return value;
}

template <class R, class... A>
auto raw(R (*launch)(A...)) {
  return [launch](typename FromPython<A>::type... args) {
    py::gil_scoped_release unlocked;
    return launch(to_native<A>(args)...);
  };
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  namespace cpu = entcov::cpu;
  m.def("isa", &cpu::isa);
  m.def("set_isa", &cpu::set_isa, py::arg("name").none(false));
  m.def("first_bad_target", raw(cpu::first_bad_target));
  m.def("row_stats", raw(cpu::row_stats));
  m.def("merge_row_stats", raw(cpu::merge_row_stats));
  m.def("logits_grad", raw(cpu::logits_grad));
  m.def("covariance_stats", raw(cpu::covariance_stats));
  m.def("merge_covariance_stats", raw(cpu::merge_covariance_stats));
  m.def("logit_covariance_grad", raw(cpu::logit_covariance_grad));
  m.def("advise_huge_pages", raw(cpu::advise_huge_pages));
  m.def("clamped_stats", raw(cpu::clamped_stats));
  m.def("clamp_sketch", raw(cpu::clamp_sketch));
  m.def("clamp_guess", raw(cpu::clamp_guess));
  m.def("clamp_part", raw(cpu::clamp_part));
  m.def("clamp_narrow", raw(cpu::clamp_narrow));
}
