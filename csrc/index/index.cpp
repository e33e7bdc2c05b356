// Index builder for packed token data: which tokens make a sample, and which corpus a sample comes from.
// Integers are 64 bits wide (128 where products need it); nothing is counted in floating point.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// MT19937 (Matsumoto and Nishimura 1998), begun from a state of NumPy's and handed back to it.
class MersenneTwister {
 public:
  MersenneTwister(const std::uint32_t* key, std::int64_t position) : position_(position) {
    std::copy(key, key + kWords, key_);
  }

  std::uint32_t next() {
    if (position_ == kWords) twist();
    std::uint32_t word = key_[position_++];
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c5680u;
    word ^= (word << 15) & 0xefc60000u;
    return word ^ (word >> 18);
  }

  // Uniform in [0, limit], drawn as NumPy's RandomState draws it: masked, what is too large is drawn again.
  std::uint32_t below(std::uint32_t limit, std::uint32_t mask) {
    std::uint32_t value;
    do value = next() & mask;
    while (value > limit);
    return value;
  }

  const std::uint32_t* key() const { return key_; }
  std::int64_t position() const { return position_; }
  static constexpr std::int64_t kWords = 624;

 private:
  void twist() {
    for (std::int64_t i = 0; i < kWords; ++i) {
      const std::uint32_t word = (key_[i] & 0x80000000u) | (key_[(i + 1) % kWords] & 0x7fffffffu);
      key_[i] = key_[(i + 397) % kWords] ^ (word >> 1) ^ ((word & 1u) ? 0x9908b0dfu : 0u);
    }
    position_ = 0;
  }

  std::uint32_t key_[kWords];
  std::int64_t position_;
};

// 0, 1, ..., count - 1 in the order that RandomState.shuffle gives it, and the state behind it.
// Fisher and Yates's shuffle waits for memory; what is drawn does not depend on the data, so it is drawn ahead and
// the places are fetched early.
static py::tuple shuffled_range(std::int64_t count, const Array<std::uint32_t>& key, std::int64_t position) {
  if (count < 0 || count > std::int64_t{1} << 32) throw std::invalid_argument("count must be at most 2^32");
  if (key.size() != MersenneTwister::kWords) throw std::invalid_argument("a state of MT19937 has 624 words");
  py::array_t<std::uint32_t> result(count);
  py::array_t<std::uint32_t> key_after(MersenneTwister::kWords);
  std::uint32_t* order = result.mutable_data();
  MersenneTwister generator(key.data(), position);
  {
    py::gil_scoped_release release;
    std::iota(order, order + count, std::uint32_t{0});
    constexpr std::int64_t kAhead = 32;
    std::uint32_t drawn[kAhead];
    std::uint32_t mask = 0;
    for (std::int64_t bits = count - 1; bits > 0; bits >>= 1) mask = (mask << 1) | 1u;
    const auto draw = [&](std::int64_t place) {
      while ((mask >> 1) >= static_cast<std::uint64_t>(place)) mask >>= 1;
      const std::uint32_t other = generator.below(static_cast<std::uint32_t>(place), mask);
      drawn[place % kAhead] = other;
      __builtin_prefetch(order + other, 1);
    };
    std::int64_t ahead = count - 1;
    for (; ahead > 0 && ahead > count - 1 - kAhead; --ahead) draw(ahead);
    for (std::int64_t place = count - 1; place > 0; --place) {
      std::swap(order[place], order[drawn[place % kAhead]]);
      if (ahead > 0) draw(ahead--);
    }
  }
  std::copy(generator.key(), generator.key() + MersenneTwister::kWords, key_after.mutable_data());
  return py::make_tuple(result, key_after, generator.position());
}

// First token of every sample, as pairs (position in document_order, offset in that document).
// Samples share one token: the last label of one is the first input of the next.
// The same walk as Megatron's build_sample_idx with its extra token, the last partial sample dropped.
template <typename Document>
static py::array_t<std::int64_t> build_sample_index(const Array<std::int32_t>& sizes,
                                                    const Array<Document>& document_order,
                                                    std::int64_t sequence_length) {
  if (sequence_length < 1) throw std::invalid_argument("sequence_length must be at least 1");
  const std::int32_t* size = sizes.data();
  const Document* order = document_order.data();
  const std::int64_t documents = document_order.size();
  const std::int64_t known = sizes.size();

  for (std::int64_t i = 0; i < documents; ++i) {
    if (static_cast<std::int64_t>(order[i]) < 0 || static_cast<std::int64_t>(order[i]) >= known)
      throw std::out_of_range("document_order names no document");
  }
  std::int64_t tokens = 0;  // every document once in any order has as many tokens as in its own
  if (documents == known) {
    for (std::int64_t i = 0; i < known; ++i) tokens += size[i];
  } else {
    for (std::int64_t i = 0; i < documents; ++i) tokens += size[order[i]];
  }
  const std::int64_t samples = tokens > 0 ? (tokens - 1) / sequence_length : 0;

  py::array_t<std::int64_t> result({samples + 1, std::int64_t{2}});
  std::int64_t* index = result.mutable_data();
  std::fill(index, index + 2, 0);
  std::int64_t sample = 1;
  std::int64_t document_start = 0;  // tokens before this document
  {
    py::gil_scoped_release release;
    constexpr std::int64_t kAhead = 48;
    for (std::int64_t document = 0; document < documents && sample <= samples; ++document) {
      if (document + kAhead < documents) __builtin_prefetch(size + order[document + kAhead]);
      const std::int64_t document_end = document_start + size[order[document]];
      for (; sample <= samples && sample * sequence_length < document_end; ++sample) {
        index[2 * sample] = document;
        index[2 * sample + 1] = sample * sequence_length - document_start;
      }
      document_start = document_end;
    }
  }
  if (sample <= samples) throw std::invalid_argument("document_order names a document twice and leaves out another");
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
  const char* about = "int64 [samples + 1, 2]: (position in document_order, token offset) where each sample begins.";
  module.def("build_sample_index", &build_sample_index<std::uint32_t>, py::arg("sizes"),
             py::arg("document_order").noconvert(), py::arg("sequence_length"), about);
  module.def("build_sample_index", &build_sample_index<std::int64_t>, py::arg("sizes"), py::arg("document_order"),
             py::arg("sequence_length"), about);
  module.def("shuffled_range", &shuffled_range, py::arg("count"), py::arg("key"), py::arg("position"),
             "(uint32 range in the order of RandomState.shuffle, state key, state position) from a state of MT19937.");
  module.def("build_blending_index", &build_blending_index, py::arg("weights"), py::arg("samples"),
             "(int16 set, int64 index within the set) of each sample, by Tijdeman's rule.");
}
