// Python bindings of the launchers in kernels.h; the only file that includes Python. It is compiled twice: with
// ENTCOV_CUDA into the module _cuda, without it into _cpu.
//
// A launcher is bound by one line: raw() derives the Python arguments from the launcher's C++ signature. Pointers are
// passed as integers and structs as tuples of their members. Nothing is checked or owned here. An Error becomes a
// RuntimeError; otherwise the call returns whether a row is NaN.
//
// Importing _cuda needs no driver: the CUDA runtime is linked statically and loads the driver at the first launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace py = pybind11;

namespace {

using namespace entcov;
using Address = uintptr_t;  // Tensor.data_ptr() or Stream.cuda_stream; 0 is null, or the default stream

template <class T>
struct FromPython {  // a number, or a struct of pointers
  using type = std::conditional_t<std::is_class_v<T>, std::array<Address, sizeof(T) / sizeof(Address)>, T>;
};
template <class T>
struct FromPython<T*> {
  using type = Address;
};
template <>
struct FromPython<Logits> {
  using type = std::tuple<int, Address, int64_t, int64_t, int64_t>;
};
template <>
struct FromPython<RowSpec> {  // vocab_start, vocab_size, temperature (not its inverse), ignore_index
  using type = std::tuple<int64_t, int64_t, double, int64_t>;
};
template <>
struct FromPython<Messages> {
  using type = std::tuple<Address, int64_t, int64_t, int64_t>;
};
template <>
struct FromPython<TokenValues> {  // whether each is float64, addresses
  using type = std::pair<uint32_t, std::vector<Address>>;
};
template <>
struct FromPython<SelectSpec> {
  using type = std::tuple<int, bool, bool, double, double, double, int64_t, int64_t, int64_t>;
};

// An address that converts to any type of pointer.
struct Member {
  Address value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

template <class T>
T to_native(const typename FromPython<T>::type& value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else if constexpr (std::is_same_v<T, Logits>) {
    const auto& [dtype, data, row_stride, rows, width] = value;
    return {static_cast<DType>(dtype), reinterpret_cast<const void*>(data), row_stride, rows, width};
  } else if constexpr (std::is_same_v<T, RowSpec>) {
    const auto& [vocab_start, vocab_size, temperature, ignore_index] = value;
    return {vocab_start, vocab_size, static_cast<float>(1.0 / temperature), ignore_index};
  } else if constexpr (std::is_same_v<T, Messages>) {
    const auto& [data, ranks, rows, width] = value;
    return {reinterpret_cast<const float*>(data), ranks, rows, width};
  } else if constexpr (std::is_same_v<T, TokenValues>) {
    TokenValues values{static_cast<int>(value.second.size()), value.first, {}};
    for (int k = 0; k < values.count && k < kMostTokenValues; k++)
      values.data[k] = reinterpret_cast<const void*>(value.second[k]);
    return values;
  } else if constexpr (std::is_same_v<T, SelectSpec>) {
    const auto& [kind, strict, round_up, low, high, ratio, at_least, seed, step] = value;
    return {static_cast<SelectKind>(kind), strict, round_up, static_cast<float>(low), static_cast<float>(high),
            ratio, at_least, seed, step};
  } else if constexpr (std::is_same_v<T, typename FromPython<T>::type>) {
    return value;
  } else {  // a struct of pointers
    return std::apply([](auto... address) { return T{Member{address}...}; }, value);
  }
}

template <class... A>
auto raw(Error (*launch)(A...)) {
  return [launch](const typename FromPython<std::decay_t<A>>::type&... args) {
    Error error = nullptr;
    {
      py::gil_scoped_release unlocked;
      error = launch(to_native<std::decay_t<A>>(args)...);
    }
    if (error && error != kRowIsNaN) throw std::runtime_error(error);
    return error != nullptr;
  };
}

#ifndef ENTCOV_CUDA
int64_t hash_of_bytes(const std::string& bytes) {
  uint64_t hash = hash_of(-1, static_cast<int64_t>(bytes.size()));
  for (size_t at = 0; at < bytes.size(); at += sizeof(int64_t)) {
    int64_t word = 0;
    memcpy(&word, bytes.data() + at, std::min(sizeof word, bytes.size() - at));
    hash += hash_of(static_cast<int64_t>(at), word);
  }
  return static_cast<int64_t>(hash);
}

// Where the members of SelectWorkspace are that ranks add up, in int64.
py::dict select_layout() {
  constexpr auto word = sizeof(int64_t);
  return py::dict(py::arg("words") = sizeof(SelectWorkspace) / word,
                  py::arg("sums") = offsetof(SelectWorkspace, sums) / word,
                  py::arg("histograms") = offsetof(SelectWorkspace, histograms) / word,
                  py::arg("histogram") = sizeof(Histogram) / word,
                  py::arg("marks") = offsetof(SelectWorkspace, marks) / word);
}
#endif

}  // namespace

#ifdef ENTCOV_CUDA
PYBIND11_MODULE(_cuda, m) {
#else
PYBIND11_MODULE(_cpu, m) {
#endif
  namespace core = ENTCOV_CORE;
  m.def("segments", &core::segments);
  m.def("hash_parts", &core::hash_parts);
  m.def("message", raw(core::message));
  m.def("row_stats", raw(core::row_stats));
  m.def("merge_row_stats", raw(core::merge_row_stats));
  m.def("logits_grad", raw(core::logits_grad));
  m.def("clamped_stats", raw(core::clamped_stats));
  m.def("clamp_sketch", raw(core::clamp_sketch));
  m.def("clamp_bracket", raw(core::clamp_bracket));
  m.def("clamp_partial", raw(core::clamp_partial));
  m.def("clamp_refine", raw(core::clamp_refine));
  m.def("covariance_stats", raw(core::covariance_stats));
  m.def("merge_covariance_stats", raw(core::merge_covariance_stats));
  m.def("logit_covariance_grad", raw(core::logit_covariance_grad));
  m.def("token_sums", raw(core::token_sums));
  m.def("token_means", raw(core::token_means));
  m.def("token_scores", raw(core::token_scores));
  m.def("select_workspace", &core::select_workspace);
  m.def("token_select", raw(core::token_select));
  m.def("token_summary", raw(core::token_summary));
#ifndef ENTCOV_CUDA
  m.def("hash", &hash_of_bytes);
  m.attr("SELECT_LAYOUT") = select_layout();
  m.def("isa", &core::isa);
  m.def("set_isa", &core::set_isa, py::arg("name").none(false));
  m.def("advise_huge_pages", [](Address memory, int64_t bytes) {
    core::advise_huge_pages(reinterpret_cast<void*>(memory), bytes);
  });
#endif
}
