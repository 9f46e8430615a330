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

// A residual's values; its shapes were checked with the arguments.
std::vector<Escape> escapes_of(std::string_view op, const at::Tensor& weight, const at::Tensor& positions,
                               const at::Tensor& bits) {
  const int64_t* position = positions.const_data_ptr<int64_t>();
  std::vector<Escape> escapes(positions.numel());
  for (int64_t i = 0, previous = -1; i < positions.numel(); previous = position[i++]) {
    TORCH_CHECK(position[i] > previous && position[i] < weight.numel(), op, ": positions[", i, "] is ", position[i],
                " after ", previous, "; expected ascending positions below ", weight.numel(), ".");
    escapes[i] = {position[i], bits.element_size() == 2 ? uint32_t(uint16_t(bits.const_data_ptr<int16_t>()[i]))
                                                        : uint32_t(bits.const_data_ptr<int32_t>()[i])};
  }
  return escapes;
}

void put(const ExactScaleArgs& args, const Escape& escape) {
  const int64_t at = escape.position / args.cols * args.stride + escape.position % args.cols;
  if (args.dtype == DType::kFloat32) {
    static_cast<uint32_t*>(args.weight)[at] = escape.bits;
  } else {
    static_cast<uint16_t*>(args.weight)[at] = uint16_t(escape.bits);
  }
}

// What one thread has to do and has done: rows [begin, done) are moved, and these are their new escapes.
struct Part {
  int64_t begin, end, done;
  std::vector<Escape> escapes;
  std::unique_ptr<Escape[]> of_chunk;  // room for as many as a chunk has weights; made before a row is touched
};

// One pass over a weight: a scale is undone (`from`), another applied (`to`), or both; null ones are not.
class Pass {
 public:
  Pass(const at::Tensor& weight, const Scaling* from, std::vector<Escape> old, const Scaling* to)
      : from_(from == nullptr ? nullptr : &from->args),
        to_(to == nullptr ? nullptr : &to->args),
        pattern_(weight.element_size() == 2 ? at::kShort : at::kInt),
        cols_(weight.size(1)),
        chunk_(std::max<int64_t>(1, kChunk / std::max<int64_t>(1, cols_))),
        old_(std::move(old)) {
    const int64_t rows = weight.size(0);
    const int64_t most = std::clamp<int64_t>(rows, 1, at::get_num_threads());
    const int64_t tasks = std::clamp<int64_t>(weight.numel() / kParallelGrain, 1, most);
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t begin = rows * t / tasks;
      parts_.push_back({begin, rows * (t + 1) / tasks, begin, {}, nullptr});
    }
  }

  // Moves the weight, and returns the new escapes' positions and bits. All or nothing: after an exception (escapes want
  // more memory than there is) every weight is what it was.
  std::tuple<at::Tensor, at::Tensor> run() {
    try {
      at::parallel_for(0, int64_t(parts_.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) forward(parts_[t]);
      });
      return escapes();
    } catch (...) {
      for (Part& part : parts_) backward(part);
      throw;
    }
  }

 private:
  void forward(Part& part) {
    const StandardFloats guard;
    part.of_chunk.reset(new Escape[std::min(chunk_, part.end - part.begin) * cols_]);
    while (part.done < part.end) {
      const int64_t stop = std::min(part.end, part.done + chunk_);
      // Grows before a chunk is touched, never while one is half done.
      const size_t most = part.escapes.size() + (stop - part.done) * cols_;
      if (most > part.escapes.capacity()) part.escapes.reserve(std::max(2 * part.escapes.capacity(), most));
      if (from_ != nullptr) take_out(*from_, part.done, stop, old_);
      if (to_ != nullptr) {
        Escape* const found = part.of_chunk.get();
        part.escapes.insert(part.escapes.end(), found, found + kernels_.merge_exact(*to_, part.done, stop, found));
      }
      part.done = stop;
    }
  }

  void backward(Part& part) {
    const StandardFloats guard;
    if (to_ != nullptr) take_out(*to_, part.begin, part.done, part.escapes);
    // Finds the escapes again that are in old_.
    for (int64_t r = part.begin; from_ != nullptr && r < part.done; r += chunk_) {
      kernels_.merge_exact(*from_, r, std::min(part.done, r + chunk_), part.of_chunk.get());
    }
  }

  void take_out(const ExactScaleArgs& args, int64_t begin, int64_t end, const std::vector<Escape>& escapes) {
    kernels_.unmerge_exact(args, begin, end);
    const auto is_before = [](const Escape& escape, int64_t position) { return escape.position < position; };
    auto escape = std::lower_bound(escapes.begin(), escapes.end(), begin * cols_, is_before);
    for (; escape != escapes.end() && escape->position < end * cols_; ++escape) put(args, *escape);
  }

  std::tuple<at::Tensor, at::Tensor> escapes() {
    int64_t count = 0;
    for (const Part& part : parts_) count += int64_t(part.escapes.size());
    at::Tensor positions = at::empty({count}, at::kLong), bits = at::empty({count}, pattern_);
    int64_t i = 0;
    for (const Part& part : parts_) {
      for (const Escape& escape : part.escapes) {
        positions.mutable_data_ptr<int64_t>()[i] = escape.position;
        if (pattern_ == at::kShort) {
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
  at::ScalarType pattern_;
  int64_t cols_, chunk_;  // rows of a chunk
  std::vector<Escape> old_;
  std::vector<Part> parts_;
  const cpu::Kernels& kernels_ = cpu::kernels();
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_exact_(const at::Tensor& weight, const at::Tensor& scale,
                                                            int64_t dim) {
  const at::Tensor parity = at::empty({weight.size(0), (weight.size(1) + 7) / 8}, at::kByte);
  const Scaling to(weight, scale, dim, parity);
  const auto [positions, bits] = Pass(weight, nullptr, {}, &to).run();
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
  std::vector<Escape> old = escapes_of("unmerge_exact_", weight, positions, bits);
  const Scaling from(weight, scale, dim, parity);
  Pass(weight, &from, std::move(old), nullptr).run();
}

std::tuple<at::Tensor, at::Tensor> swap_exact_(const at::Tensor& weight, const at::Tensor& old_scale,
                                               const at::Tensor& new_scale, int64_t dim, const at::Tensor& parity,
                                               const at::Tensor& positions, const at::Tensor& bits) {
  std::vector<Escape> old = escapes_of("swap_exact_", weight, positions, bits);
  const Scaling from(weight, old_scale, dim, parity), to(weight, new_scale, dim, parity);
  return Pass(weight, &from, std::move(old), &to).run();
}

}  // namespace ia3
