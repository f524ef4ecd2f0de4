// Spreads a recurrence over threads. A pass is one direction of a scan over B sequences of `length()` tokens:
//
//   pass.scan(begin, end, s, sum)   runs tokens [begin, end) from state s, writes outputs, adds to sum; s moves on
//   pass.reduce(begin, end, p, q)   the same tokens as the affine map s -> p s + q, without outputs; p in double
//   pass.start(s), pass.finish(s, sum)
//
// With enough sequences each thread takes whole ones; wide sequences are split into strips of channels. A narrow
// batch smaller than the thread count is split in time: the members of a team reduce neighbouring blocks that fit
// their L2, exchange the maps, and scan their block again from the cache with the right state.
#pragma once

#include <memory>
#include <vector>

#include "../numbers.h"
#include "parallel.h"

namespace linrnn {

constexpr int64_t kMinStrip = 256;         // channels; narrower strips lose more bandwidth than a thread gains
constexpr int64_t kSumBlock = 256;         // tokens added up before they join the long sum, for its rounding error
constexpr int64_t kBlockBytes = 128 << 10; // of inputs per member and block of the time-parallel form

// Scratch rows of one thread, each on its own cache lines.
template <class N>
class Rows {
  int64_t stride_;
  std::vector<char> bytes_;
  N* base_;

 public:
  Rows(int64_t rows, int64_t width) : stride_((width * sizeof(N) + 127) / 64 * 64 / sizeof(N)) {
    bytes_.resize(rows * stride_ * sizeof(N) + 64);
    base_ = reinterpret_cast<N*>((reinterpret_cast<uintptr_t>(bytes_.data()) + 63) / 64 * 64);
  }
  N* operator[](int64_t i) { return base_ + i * stride_; }
};

// Scans [begin, end) and adds the block sums to `total`.
template <class Pass, class S, class M>
void scan_and_sum(const Pass& pass, int64_t begin, int64_t end, S* s, M* partial, M* total) {
  if (!pass.sums()) return pass.scan(begin, end, s, partial);
  for (int64_t t = begin; t < end; t += kSumBlock) {
    std::fill(partial, partial + pass.width, M{});
    pass.scan(t, std::min(t + kSumBlock, end), s, partial);
    for (int64_t j = 0; j < pass.width; ++j) total[j] = add(total[j], partial[j]);
  }
}

template <class Pass>
void drive_whole(const Pass& pass) {
  Rows<typename Pass::S> s(1, pass.width);
  Rows<typename Pass::M> sums(2, pass.width);
  std::fill(sums[1], sums[1] + pass.width, typename Pass::M{});
  pass.start(s[0]);
  scan_and_sum(pass, 0, pass.length(), s[0], sums[0], sums[1]);
  pass.finish(s[0], sums[1]);
}

// What the members of a team share. The maps have two sets of slots, used in turn, so that one barrier a round does.
template <class Pass>
struct Team {
  using S = typename Pass::S;
  using M = typename Pass::M;
  int members;
  Rows<typename Pass::Wide> p;
  Rows<M> sums;
  Rows<S> q;
  SpinBarrier barrier;
  Team(int members, int64_t width)
      : members(members), p(2 * members, width), sums(2 * members, width), q(2 * members, width) {}
};

template <class Pass>
void drive_team(const Pass& pass, Team<Pass>& team, int member) {
  using S = typename Pass::S;
  using M = typename Pass::M;
  const int64_t width = pass.width, length = pass.length();
  const int64_t block = std::max<int64_t>(16, kBlockBytes / (width * pass.bytes_per_channel()));
  // Member 0 knows its state and goes over its block once, the others twice: it takes a block of twice the size.
  const int64_t first = 2 * block, round = first + (team.members - 1) * block;
  Rows<S> own(1, width);
  S* s = own[0];
  M *partial = team.sums[2 * member], *total = team.sums[2 * member + 1];
  std::fill(total, total + width, M{});
  pass.start(s);
  for (int64_t t0 = 0, parity = 0; t0 < length; t0 += round, parity ^= 1) {
    const auto clip = [&](int64_t t) { return std::min(t, length); };
    const int64_t begin = clip(member ? t0 + first + (member - 1) * block : t0);
    const int64_t end = clip(t0 + first + member * block);
    const auto slot = [&](int m) { return parity * team.members + m; };
    if (member) {
      pass.reduce(begin, end, team.p[slot(member)], team.q[slot(member)]);
    } else {
      scan_and_sum(pass, begin, end, s, partial, total);
      std::copy(s, s + width, team.q[slot(0)]);
    }
    team.barrier.wait(team.members);
    std::copy_n(team.q[slot(0)], width, s);
    const auto apply = [&](int m) {
      const auto* p = team.p[slot(m)];
      const S* q = team.q[slot(m)];
      for (int64_t j = 0; j < width; ++j) {
        if (pass.resets() && is_zero(p[j])) s[j] = q[j];
        else round_to(add(mul(p[j], in_double(s[j])), in_double(q[j])), s[j]);
      }
    };
    for (int m = 1; m < (member ? member : team.members); ++m) apply(m);
    if (member) scan_and_sum(pass, begin, end, s, partial, total);
  }
  team.barrier.wait(team.members);
  if (member) return;
  for (int m = 1; m < team.members; ++m)
    for (int64_t j = 0; j < width; ++j) total[j] = add(total[j], team.sums[2 * m + 1][j]);
  pass.finish(s, total);
}

// make(b, j0, width) gives the pass over channels [j0, j0 + width) of sequence b.
template <class Pass, class Make>
void drive(int64_t B, int64_t D, int threads, const Make& make) {
  if (B == 0 || D == 0) return;
  std::atomic<int64_t> next{0};
  std::vector<std::unique_ptr<Team<Pass>>> teams;
  std::atomic<int> ready{0};
  run_parallel(threads, [&](int index, int count) {
    KernelScope scope;
    int64_t strips = 1;
    const auto unbalanced = [&] {
      return B * strips < count || (B * strips % count && B * strips < 4 * count);
    };
    while (unbalanced() && D / (2 * strips) >= kMinStrip) strips *= 2;
    const int members = B * strips < count ? int(count / (B * strips)) : 1;
    const auto item = [&](int64_t i) {
      const int64_t per_strip = (D / strips + 63) / 64 * 64, j0 = std::min(D, i % strips * per_strip);
      return make(i / strips, j0, i % strips == strips - 1 ? D - j0 : std::min(per_strip, D - j0));
    };
    if (members > 1) {
      if (index == 0) {
        for (int64_t i = 0; i < B * strips; ++i) teams.push_back(std::make_unique<Team<Pass>>(members, item(i).width));
        ready.store(1, std::memory_order_release);
      }
      while (!ready.load(std::memory_order_acquire)) std::this_thread::yield();
      if (index < B * strips * members) drive_team(item(index / members), *teams[index / members], index % members);
      return;
    }
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < B * strips;) drive_whole(item(i));
  });
}

}  // namespace linrnn
