// Scaling whose undoing is bit-exact: threads, escapes, and the way back from an error. The arithmetic is in
// core/exact_scale.h.
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <memory>
#include <vector>

#include "../cpu/kernels.h"
#include "backend.h"
#include "checks.h"

namespace ia3 {
namespace {

// Weights that a thread handles at a time: they stay in its cache between undoing one scale and applying another.
constexpr int64_t kChunk = 16384;

// Subnormals kept and rounding to nearest, whatever the process has set: undoing must not depend on it.
class StandardFloats {
 public:
  StandardFloats() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardFloats() { std::fesetenv(&saved_); }
  StandardFloats(const StandardFloats&) = delete;
  StandardFloats& operator=(const StandardFloats&) = delete;

 private:
  std::fenv_t saved_;
};

template <typename T>
at::Tensor inverse_of(const at::Tensor& scale, at::ScalarType type) {
  const StandardFloats guard;
  at::Tensor inverse = at::empty(scale.sizes(), type);
  const float* from = scale.const_data_ptr<float>();
  T* to = inverse.mutable_data_ptr<T>();
  for (int64_t i = 0; i < scale.numel(); ++i) to[i] = T(1) / T(from[i]);
  return inverse;
}

// A scale for the kernels, with the tensors that own its memory
struct Scaling {
  Scaling(const at::Tensor& weight, const at::Tensor& given, int64_t dim, const at::Tensor& parity) {
    for (const at::Tensor* tensor : {&weight, &given, &parity}) check_memory(*tensor);
    const int64_t rows = weight.size(0), cols = weight.size(1), groups = dim == 1 ? given.size(0) : 1;
    scale = as_factors(given);
    const bool is_wide = weight.scalar_type() == at::kFloat;
    inverse = is_wide ? inverse_of<double>(scale, at::kDouble) : inverse_of<float>(scale, at::kFloat);
    args = {dtype_of(weight),
            weight.mutable_data_ptr(),
            weight.stride(0),
            cols,
            scale.const_data_ptr<float>(),
            inverse.const_data_ptr(),
            dim == 0,
            std::max<int64_t>(1, rows / groups),
            parity.mutable_data_ptr<uint8_t>()};
  }

  at::Tensor scale, inverse;
  ExactScaleArgs args;
};

at::ScalarType pattern_type(const at::Tensor& weight) { return weight.element_size() == 2 ? at::kShort : at::kInt; }

int64_t parity_bytes(int64_t cols) { return (cols + 7) / 8; }

// The residual's values; its shapes were checked with the arguments.
void check_residual(std::string_view op, const at::Tensor& weight, const at::Tensor& positions) {
  const int64_t* position = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0, previous = -1; i < positions.numel(); previous = position[i++]) {
    TORCH_CHECK(position[i] > previous && position[i] < weight.numel(), op, ": positions[", i, "] is ", position[i],
                " after ", previous, "; expected ascending positions below ", weight.numel(), ".");
  }
}

uint32_t pattern_at(const at::Tensor& bits, int64_t i) {
  return bits.element_size() == 2 ? uint32_t(uint16_t(bits.const_data_ptr<int16_t>()[i]))
                                  : uint32_t(bits.const_data_ptr<int32_t>()[i]);
}

void put(const ExactScaleArgs& args, const Escape& escape) {
  const int64_t at = escape.position / args.cols * args.stride + escape.position % args.cols;
  if (args.dtype == DType::kFloat32) {
    static_cast<uint32_t*>(args.weight)[at] = escape.bits;
  } else {
    static_cast<uint16_t*>(args.weight)[at] = uint16_t(escape.bits);
  }
}

// Grows before a chunk is touched, never while one is half done.
class Escapes {
 public:
  // Room for `more`, without which nothing may be appended
  void reserve(int64_t more) {
    if (size_ + more <= capacity_) return;
    const int64_t capacity = std::max(2 * capacity_, size_ + more);
    std::unique_ptr<Escape[]> larger(new Escape[capacity]);
    std::copy(begin(), end(), larger.get());
    data_ = std::move(larger);
    capacity_ = capacity;
  }
  void append(Escape escape) { data_[size_++] = escape; }
  void grow(int64_t count) { size_ += count; }
  void clear() { size_ = 0; }
  Escape* begin() { return data_.get(); }
  Escape* end() { return data_.get() + size_; }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<Escape[]> data_;
  int64_t size_ = 0, capacity_ = 0;
};

// What one thread has to do and has done: rows [begin, done) are moved, and these are their new escapes.
struct Part {
  int64_t begin, end, done;
  Escapes escapes;
};

// One pass over a weight: a scale is undone (`from`), another applied (`to`), or both; null ones are not.
class Pass {
 public:
  Pass(const at::Tensor& weight, const Scaling* from, const at::Tensor& positions, const at::Tensor& bits,
       const Scaling* to)
      : from_(from == nullptr ? nullptr : &from->args),
        to_(to == nullptr ? nullptr : &to->args),
        cols_(weight.size(1)),
        chunk_(std::max<int64_t>(1, kChunk / cols_)) {
    const int64_t rows = weight.size(0);
    old_.reserve(positions.numel());
    for (int64_t i = 0; i < positions.numel(); ++i) {
      old_.append({positions.const_data_ptr<int64_t>()[i], pattern_at(bits, i)});
    }
    const int64_t most = std::min<int64_t>(rows, at::get_num_threads());
    const int64_t tasks = std::clamp<int64_t>(weight.numel() / kParallelGrain, 1, most);
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t begin = rows * t / tasks;
      parts_.push_back({begin, rows * (t + 1) / tasks, begin, {}});
    }
  }

  // Moves the weight, and returns the new escapes' positions and bits. All or nothing: after an exception (escapes want
  // more memory than there is) every weight is what it was.
  std::tuple<at::Tensor, at::Tensor> run(at::ScalarType pattern) {
    try {
      at::parallel_for(0, int64_t(parts_.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) forward(parts_[t]);
      });
      return escapes(pattern);
    } catch (...) {
      for (Part& part : parts_) backward(part);
      throw;
    }
  }

 private:
  void forward(Part& part) {
    const StandardFloats guard;
    while (part.done < part.end) {
      const int64_t stop = std::min(part.end, part.done + chunk_);
      part.escapes.reserve((stop - part.done) * cols_);
      if (from_ != nullptr) take_out(*from_, part.done, stop, old_);
      if (to_ != nullptr) part.escapes.grow(kernels_.merge_exact(*to_, part.done, stop, part.escapes.end()));
      part.done = stop;
    }
  }

  void backward(Part& part) {
    const StandardFloats guard;
    if (to_ != nullptr) take_out(*to_, part.begin, part.done, part.escapes);
    part.escapes.clear();  // room for those that merging finds again, which are in old_
    for (int64_t r = part.begin; from_ != nullptr && r < part.done; r += chunk_) {
      kernels_.merge_exact(*from_, r, std::min(part.done, r + chunk_), part.escapes.begin());
    }
  }

  void take_out(const ExactScaleArgs& args, int64_t begin, int64_t end, Escapes& escapes) {
    kernels_.unmerge_exact(args, begin, end);
    const auto is_before = [](const Escape& escape, int64_t position) { return escape.position < position; };
    const Escape* escape = std::lower_bound(escapes.begin(), escapes.end(), begin * cols_, is_before);
    for (; escape != escapes.end() && escape->position < end * cols_; ++escape) put(args, *escape);
  }

  std::tuple<at::Tensor, at::Tensor> escapes(at::ScalarType pattern) {
    int64_t count = 0;
    for (const Part& part : parts_) count += part.escapes.size();
    at::Tensor positions = at::empty({count}, at::kLong), bits = at::empty({count}, pattern);
    int64_t i = 0;
    for (Part& part : parts_) {
      for (const Escape& escape : part.escapes) {
        positions.mutable_data_ptr<int64_t>()[i] = escape.position;
        if (pattern == at::kShort) {
          bits.mutable_data_ptr<int16_t>()[i++] = int16_t(escape.bits);
        } else {
          bits.mutable_data_ptr<int32_t>()[i++] = int32_t(escape.bits);
        }
      }
    }
    return {positions, bits};
  }

  const ExactScaleArgs* from_;
  const ExactScaleArgs* to_;
  int64_t cols_, chunk_;  // rows of a chunk
  Escapes old_;
  std::vector<Part> parts_;
  const cpu::Kernels& kernels_ = cpu::kernels();
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_exact_(const at::Tensor& weight, const at::Tensor& scale,
                                                            int64_t dim) {
  const at::Tensor parity = at::empty({weight.size(0), parity_bytes(weight.size(1))}, at::kByte);
  const Scaling to(weight, scale, dim, parity);
  const at::Tensor none = at::empty({0}, at::kLong), no_bits = at::empty({0}, pattern_type(weight));
  if (weight.numel() == 0) return {parity, none, no_bits};
  const auto [positions, bits] = Pass(weight, nullptr, none, no_bits, &to).run(pattern_type(weight));
  return {parity, positions, bits};
}

at::Tensor stays_finite(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  const Scaling to(weight, scale, dim, at::empty({0}, at::kByte));
  std::atomic<bool> finite = true;
  const auto& kernels = cpu::kernels();
  parallel(weight.size(0), weight.numel(), [&](int64_t begin, int64_t end) {
    const StandardFloats guard;
    if (!kernels.stays_finite(to.args, begin, end)) finite = false;
  });
  return at::scalar_tensor(finite.load(), at::kBool);
}

void unmerge_exact_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim, const at::Tensor& parity,
                    const at::Tensor& positions, const at::Tensor& bits) {
  check_residual("unmerge_exact_", weight, positions);
  const Scaling from(weight, scale, dim, parity);
  if (weight.numel() != 0) Pass(weight, &from, positions, bits, nullptr).run(pattern_type(weight));
}

std::tuple<at::Tensor, at::Tensor> swap_exact_(const at::Tensor& weight, const at::Tensor& old_scale,
                                               const at::Tensor& new_scale, int64_t dim, const at::Tensor& parity,
                                               const at::Tensor& positions, const at::Tensor& bits) {
  check_residual("swap_exact_", weight, positions);
  const Scaling from(weight, old_scale, dim, parity), to(weight, new_scale, dim, parity);
  if (weight.numel() == 0) return {at::empty({0}, at::kLong), at::empty({0}, pattern_type(weight))};
  return Pass(weight, &from, positions, bits, &to).run(pattern_type(weight));
}

}  // namespace ia3
