// Pathfinder images (Linsley et al. 2018, arXiv:1805.08315), grown from tables of stamps: see lra/tasks/pathfinder.py for
// what an image is, and lra/tasks/pathfinder_reference.py for the same program in Python.
//
// Everything is integer, and image i of a seed has a random stream of its own, so an image depends on nothing else. The
// canvas is the image in a frame in which every stamp fits, and a stamp's row is 32 bytes: loops need no bounds.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rows.h"

namespace linrnn {
namespace pathfinder {

constexpr int SEEDS = 360, STRIDE = 32, FREE = 76, DEAD_END = 1671;
constexpr int DRAWS = 3, TRIES = 5, PLACES = 1000;

struct Offset { int32_t y, x; };

}  // namespace pathfinder
}  // namespace linrnn

// The tables of one margin, as in lra/tasks/pathfinder_stamps.py.
struct LinrnnPathfinderStamps {
  int64_t margin, reach, candidates;
  const uint8_t *ink, *mask, *dilated, *limit, *clear;  // (bars, 2 reach + 1, 32)
  const uint32_t* turn;                                 // (bars, candidates)
  const linrnn::pathfinder::Offset *candidate, *advance, *seed_head, *seed_pivot, *circle;
  const uint8_t* seeded;                   // (360,)
  const uint8_t *border, *border_dilated;  // (canvas, canvas)
  const uint8_t* disc;                     // (2 reach + 1, 32)
};

struct LinrnnPathfinder {
  int64_t size, pad, margins, seed_distance, paddles, distractors, distractor_paddles;
  int64_t every_direction;
  int64_t target, distractor, marker;  // brightness
  uint64_t seed;
  int64_t first, count, attempts;
  uint8_t *images, *labels, *margin;  // (count, size, size), (count,), (count,)
  int32_t* bars;    // (count, 2 paddles + distractors distractor_paddles, 3): y, x, stamp; -1 where there is none
  int16_t* marked;  // (count, 2, 2): y, x of the origin and of the terminal marker
  int64_t* tried;   // (count,): pairs of chains begun
};

namespace linrnn {
namespace pathfinder {

// SplitMix64 (Steele et al. 2014) as a counter-based generator: number n of a stream is a hash of key + n gamma.
class Stream {
  static constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15ull;
  uint64_t state_;
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }

 public:
  Stream(uint64_t seed, uint64_t index) : state_(mix(mix(seed + GAMMA) + index)) {}
  uint32_t next() { return uint32_t(mix(state_ += GAMMA) >> 32); }
  uint32_t below(uint64_t n) { return uint32_t((uint64_t(next()) * n) >> 32); }
};

struct Bar { int y, x, stamp; };
struct Chain {
  Bar last;
  Offset pivot;
};

class Generator {
  const LinrnnPathfinder& args_;
  const LinrnnPathfinderStamps* all_;
  const LinrnnPathfinderStamps* stamps_ = nullptr;
  const int size_, pad_, canvas_;
  // What is taken, and what is taken within a margin; each with room for the last stamp's idle columns.
  std::vector<uint8_t> taken_, near_, kept_taken_, kept_near_;
  std::vector<uint16_t> light_;
  std::vector<uint32_t> weights_;
  std::vector<Bar> bars_;

  size_t area() const { return size_t(canvas_) * canvas_; }
  size_t at(int y, int x) const { return size_t(y + pad_) * canvas_ + x + pad_; }
  size_t corner(const Bar& bar) const { return at(bar.y - int(stamps_->reach), bar.x - int(stamps_->reach)); }
  int side() const { return 2 * int(stamps_->reach) + 1; }
  bool inside(int y, int x) const { return y >= 0 && x >= 0 && y < size_ && x < size_; }
  const uint8_t* stamp(const uint8_t* table, int i) const { return table + size_t(i) * side() * STRIDE; }

  bool usable(int degree) const { return args_.every_direction || stamps_->seeded[degree]; }

  bool fits(const uint8_t* limits, const Bar& bar) const {
    const uint8_t *limit = stamp(limits, bar.stamp), *row = taken_.data() + corner(bar);
    for (int y = 0; y < side(); ++y, row += canvas_, limit += STRIDE) {
      uint8_t over = 0;
      for (int x = 0; x < STRIDE; ++x) over |= row[x] > limit[x];
      if (over) return false;
    }
    return true;
  }
  void raise(std::vector<uint8_t>& levels, const uint8_t* table, const Bar& bar) {
    const uint8_t* from = stamp(table, bar.stamp);
    uint8_t* row = levels.data() + corner(bar);
    for (int y = 0; y < side(); ++y, row += canvas_, from += STRIDE)
      for (int x = 0; x < STRIDE; ++x) row[x] = std::max(row[x], from[x]);
  }
  void take(const Bar& bar) { raise(taken_, stamps_->mask, bar), raise(near_, stamps_->dilated, bar); }
  void shine(const uint8_t* from, const Bar& bar, int brightness) {
    uint16_t* row = light_.data() + corner(bar);
    for (int y = 0; y < side(); ++y, row += canvas_, from += STRIDE)
      for (int x = 0; x < STRIDE; ++x) row[x] = std::max(row[x], uint16_t(from[x] * brightness));
  }

  // A first bar with its tail here; false where its tail, head or pivot is outside the image.
  bool begin(Chain& chain, int y, int x, int degree) const {
    const Offset head = stamps_->seed_head[degree], pivot = stamps_->seed_pivot[degree], go = stamps_->advance[degree];
    chain = {{y, x, degree}, {y + go.y, x + go.x}};
    return inside(y, x) && inside(y + head.y, x + head.x) && inside(y + pivot.y, x + pivot.x);
  }

  // One more bar; the one before it becomes an obstacle.
  bool extend(Chain& chain, Stream& random) {
    const int J = int(stamps_->candidates);
    const uint32_t* turn = stamps_->turn + size_t(chain.last.stamp) * J;
    uint64_t total = 0;
    for (int j = 0; j < J; ++j) {
      const int y = chain.pivot.y + stamps_->candidate[j].y, x = chain.pivot.x + stamps_->candidate[j].x;
      weights_[j] = turn[j] && inside(y, x) ? turn[j] * uint32_t(255 - near_[at(y, x)]) : 0;
      total += weights_[j];
    }
    if (total < DEAD_END) return false;
    for (int draw = 0; draw < DRAWS; ++draw) {
      uint64_t left = random.below(total);
      int j = 0;
      for (; left >= weights_[j]; ++j) left -= weights_[j];
      const Bar bar{chain.pivot.y + stamps_->candidate[j].y, chain.pivot.x + stamps_->candidate[j].x, SEEDS + j};
      if (!fits(stamps_->limit, bar)) continue;
      take(chain.last);
      const Offset go = stamps_->advance[bar.stamp];
      chain = {bar, {chain.pivot.y + go.y, chain.pivot.x + go.x}};
      return true;
    }
    return false;
  }

  bool pair(Chain (&chains)[2], Stream& random) {
    const int margin = 2 * int(args_.seed_distance), room = size_ - 2 * margin, n = int(args_.paddles);
    const int degree = random.below(SEEDS);
    if (!usable(degree)) return false;
    std::memcpy(taken_.data(), stamps_->border, area());
    std::memcpy(near_.data(), stamps_->border_dilated, area());
    const int y = margin + random.below(room), x = margin + random.below(room);
    begin(chains[0], y, x, degree);
    for (int draw = 0;; ++draw) {
      if (draw == DRAWS) return false;
      const int other = random.below(SEEDS);
      const Offset away = stamps_->circle[random.below(SEEDS)];
      if (begin(chains[1], y + away.y, x + away.x, other)) break;
    }
    for (int c = 0; c < 2; ++c) bars_[c * n] = chains[c].last;
    for (int k = 1; k < n; ++k)
      for (int c = 0; c < 2; ++c) {
        if (!extend(chains[c], random)) return false;
        bars_[c * n + k] = chains[c].last;
      }
    for (const Chain& chain : chains) take(chain.last);
    return true;
  }

  bool crowded() const {
    int free = 0;
    for (int y = 0; y < size_; ++y) {
      const uint8_t* row = taken_.data() + at(y, 0);
      for (int x = 0; x < size_; ++x) free += row[x] <= FREE;
    }
    return 100 * free < size_ * size_;
  }

  bool distract(Bar* bars, Stream& random) {
    Chain chain;
    const int degree = random.below(SEEDS);
    if (!usable(degree)) return false;
    for (int place = 0;; ++place) {
      if (place == PLACES) return false;
      const int y = random.below(size_), x = random.below(size_);
      if (begin(chain, y, x, degree) && fits(stamps_->clear, chain.last)) break;
    }
    bars[0] = chain.last;
    for (int k = 1; k < args_.distractor_paddles; ++k) {
      if (!extend(chain, random)) return false;
      bars[k] = chain.last;
    }
    take(chain.last);
    return true;
  }

  void distractors(Stream& random) {
    const int n = int(args_.distractor_paddles);
    for (int k = 0; k < args_.distractors; ++k) {
      Bar* bars = bars_.data() + 2 * args_.paddles + k * n;
      bool found = false;
      for (int attempt = 0; attempt < TRIES && !found; ++attempt) {
        if (crowded()) break;
        kept_taken_ = taken_, kept_near_ = near_;
        found = distract(bars, random);
        if (!found) taken_ = kept_taken_, near_ = kept_near_;
      }
      if (!found) std::fill(bars, bars + n, Bar{-1, -1, -1});
    }
  }

  void paint(const Bar& origin, const Bar& terminal, uint8_t* image) {
    std::fill(light_.begin(), light_.end(), uint16_t(0));
    for (size_t i = 0; i < bars_.size(); ++i)
      if (bars_[i].stamp >= 0) {
        const int64_t brightness = int64_t(i) < 2 * args_.paddles ? args_.target : args_.distractor;
        shine(stamp(stamps_->ink, bars_[i].stamp), bars_[i], int(brightness));
      }
    for (const Bar& tip : {origin, terminal}) shine(stamps_->disc, tip, int(args_.marker));
    unsigned low = 0xFFFF, high = 0;
    for (int y = 0; y < size_; ++y)
      for (int x = 0; x < size_; ++x) {
        low = std::min(low, unsigned(light_[at(y, x)])), high = std::max(high, unsigned(light_[at(y, x)]));
      }
    const unsigned range = high - low;
    for (int y = 0; y < size_; ++y)
      for (int x = 0; x < size_; ++x)
        *image++ = uint8_t((510u * (light_[at(y, x)] - low) + range) / (2 * range));
  }

 public:
  Generator(const LinrnnPathfinder& args, const LinrnnPathfinderStamps* all)
      : args_(args), all_(all), size_(int(args.size)), pad_(int(args.pad)), canvas_(size_ + 2 * pad_),
        taken_(area() + STRIDE), near_(taken_.size()), light_(taken_.size()),
        bars_(2 * args.paddles + args.distractors * args.distractor_paddles) {
    int64_t most = 0;
    for (int64_t m = 0; m < args.margins; ++m) most = std::max(most, all[m].candidates);
    weights_.resize(most);
  }

  // Image `first + i`; false if no pair of chains was found.
  bool make(int64_t i) {
    Stream random(args_.seed, uint64_t(args_.first + i));
    const int label = random.below(2);
    stamps_ = all_ + random.below(args_.margins);
    Chain chains[2];
    int64_t tried = 1;
    for (; !pair(chains, random); ++tried)
      if (tried == args_.attempts) return false;
    distractors(random);
    const int marked = random.below(2), n = int(args_.paddles);
    const Bar origin = bars_[marked * n], terminal = chains[label ? marked : 1 - marked].last;
    paint(origin, terminal, args_.images + i * size_ * size_);
    args_.labels[i] = uint8_t(label), args_.margin[i] = uint8_t(stamps_->margin), args_.tried[i] = tried;
    const int tips[4] = {origin.y, origin.x, terminal.y, terminal.x};
    std::copy(tips, tips + 4, args_.marked + 4 * i);
    int32_t* bars = args_.bars + int64_t(bars_.size()) * 3 * i;
    for (const Bar& bar : bars_) *bars++ = bar.y, *bars++ = bar.x, *bars++ = bar.stamp;
    return true;
  }
};

}  // namespace pathfinder
}  // namespace linrnn

// Images first .. first + count - 1 on the calling thread. Returns 0, or 1 + the number of the image that failed.
LINRNN_API int64_t linrnn_pathfinder(const LinrnnPathfinder* args, const LinrnnPathfinderStamps* stamps) {
  linrnn::pathfinder::Generator generator(*args, stamps);
  for (int64_t i = 0; i < args->count; ++i)
    if (!generator.make(i)) return i + 1;
  return 0;
}
