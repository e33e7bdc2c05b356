// Index builder for packed token data: which tokens make a sample, and which corpus a sample comes from.
// Integers are 64 bits wide (128 where products need it); nothing is counted in floating point.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// First token of every sample, as pairs (position in document_order, offset in that document).
// Samples share one token: the last label of one is the first input of the next.
// The same walk as Megatron's build_sample_idx with its extra token, the last partial sample dropped.
static py::array_t<std::int64_t> build_sample_index(const Array<std::int32_t>& sizes,
                                                    const Array<std::int64_t>& document_order,
                                                    std::int64_t sequence_length) {
  if (sequence_length < 1) throw std::invalid_argument("sequence_length must be at least 1");
  const auto size = sizes.unchecked<1>();
  const auto order = document_order.unchecked<1>();
  const std::int64_t documents = order.shape(0);

  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < documents; ++i) {
    if (order(i) < 0 || order(i) >= size.shape(0)) throw std::out_of_range("document_order names no document");
    tokens += size(order(i));
  }
  const std::int64_t samples = tokens > 0 ? (tokens - 1) / sequence_length : 0;

  py::array_t<std::int64_t> result({samples + 1, std::int64_t{2}});
  auto index = result.mutable_unchecked<2>();
  index(0, 0) = 0;
  index(0, 1) = 0;
  {
    py::gil_scoped_release release;
    std::int64_t document = 0;
    std::int64_t document_start = 0;  // tokens before this document
    for (std::int64_t sample = 1; sample <= samples; ++sample) {
      const std::int64_t token = sample * sequence_length;
      while (document_start + size(order(document)) <= token) document_start += size(order(document++));
      index(sample, 0) = document;
      index(sample, 1) = token - document_start;
    }
  }
  return result;
}

// Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): among the sets that have
// earned their next sample, the one whose deadline is first. At every prefix each set is within one sample of
// its share. Weights are integers; shares are weight / sum.
static py::tuple build_blending_index(const Array<std::int64_t>& weights, std::int64_t samples) {
  const auto weight = weights.unchecked<1>();
  const std::int64_t sets = weight.shape(0);
  if (sets < 1) throw std::invalid_argument("at least one weight is needed");
  if (sets > 32767) throw std::invalid_argument("at most 32767 sets can be blended");
  __int128 total = 0;
  for (std::int64_t i = 0; i < sets; ++i) {
    if (weight(i) < 1) throw std::invalid_argument("weights must be positive");
    total += weight(i);
  }

  py::array_t<std::int16_t> set_of(samples);
  py::array_t<std::int64_t> index_of(samples);
  auto set_out = set_of.mutable_unchecked<1>();
  auto index_out = index_of.mutable_unchecked<1>();
  {
    py::gil_scoped_release release;
    const __int128 slack = sets > 1 ? 2 * sets - 2 : 1;
    std::vector<std::int64_t> taken(sets, 0);
    for (std::int64_t step = 1; step <= samples; ++step) {
      std::int64_t chosen = -1;
      __int128 chosen_deadline = 0;
      for (std::int64_t i = 0; i < sets; ++i) {
        const __int128 earned = __int128{weight(i)} * step - total * taken[i];
        if (sets > 1 && earned * slack < total) continue;
        const __int128 deadline = (__int128{taken[i]} + 1) * slack - 1;  // over weight(i)
        if (chosen < 0 || deadline * weight(chosen) < chosen_deadline * weight(i)) {
          chosen = i;
          chosen_deadline = deadline;
        }
      }
      set_out(step - 1) = static_cast<std::int16_t>(chosen);
      index_out(step - 1) = taken[chosen]++;
    }
  }
  return py::make_tuple(set_of, index_of);
}

PYBIND11_MODULE(_megatron_med_index, module) {
  module.doc() = "Index builder of megatron_med.data";
  module.def("build_sample_index", &build_sample_index, py::arg("sizes"), py::arg("document_order"),
             py::arg("sequence_length"),
             "int64 [samples + 1, 2]: (position in document_order, token offset) where each sample begins.");
  module.def("build_blending_index", &build_blending_index, py::arg("weights"), py::arg("samples"),
             "(int16 set, int64 index within the set) of each sample, by Tijdeman's rule.");
}
