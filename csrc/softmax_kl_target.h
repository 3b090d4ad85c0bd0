// The target term of decoupled softmax_kl: the KL between {the labelled classes, all others together} of the two
// networks. The same on the CPU and on CUDA.
#pragma once

#include "softmax_kl_row.h"

namespace kd {
namespace KD_ISA {
namespace {

// A probability of both networks, and d = log(q_t / q_s)
struct Share {
  double s = 0, t = 0, d = 0;
  // q_s - q_t, from d: nothing cancels
  KD_BOTH double difference() const { return s == 0 && t == 0 ? 0 : d > 0 ? t * std::expm1(-d) : -s * std::expm1(d); }
  // its part of the divergence, which is never negative
  KD_BOTH double divergence() const { return divergence_term(d, s, t); }
};

// What the target term compares: the labelled classes, the second of which is nothing where both labels are one, and
// the mass of all others
struct TargetShares {
  Share a, b, others;
};

template <typename T, typename Logits>
KD_BOTH inline Share share(const Logits& s, const Logits& t, int64_t k, const RowStats<T>& r) {
  const double d = r.t.over(t[k]) - r.s.over(s[k]) - r.log_ratio;
  return {std::exp(r.s.log_q(s[k])), std::exp(r.t.log_q(t[k])), d};
}

// A label that has most of the mass is what the other shares leave: its own ratio comes from sums that are all but 1.
KD_BOTH inline void set_from_rest(Share& most, const Share& b, const Share& others) {
  if (most.s > 0.5 && most.t > 0.5) most.d = std::log1p((b.difference() + others.difference()) / most.s);
}

// The mass of the others from that of the labels where that is less, else from their own log-sum
template <typename T, typename Logits>
KD_BOTH inline TargetShares target_shares(const Labels& l, const Logits& s, const Logits& t, const RowStats<T>& r) {
  TargetShares x;
  x.a = share(s, t, l.a, r);
  if (l.two()) x.b = share(s, t, l.b, r);
  const double labelled_s = x.a.s + x.b.s, labelled_t = x.a.t + x.b.t;
  if (labelled_s < 0.5 && labelled_t < 0.5) {
    const double more = x.a.difference() + x.b.difference();  // of the teacher's mass than of the student's
    x.others = {1 - labelled_s, 1 - labelled_t, std::log1p(more / (1 - labelled_s))};
  } else {
    const double log_s = r.s.non_target_log_mass(), log_t = r.t.non_target_log_mass();
    const double between = r.t.over(r.t.non_target_max) - r.s.over(r.s.non_target_max);
    const bool some = log_s > -HUGE_VAL && log_t > -HUGE_VAL;
    x.others = {std::exp(log_s), std::exp(log_t),
                some ? between + r.non_target_log_ratio - r.log_ratio : log_t - log_s};
    set_from_rest(x.a, x.b, x.others);
    set_from_rest(x.b, x.a, x.others);
  }
  return x;
}

// sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s) for the non-target mass S
template <typename T, typename Logits>
KD_BOTH inline double target_divergence(const Labels& l, const Logits& s, const Logits& t, const RowStats<T>& r) {
  const TargetShares x = target_shares(l, s, t, r);
  return x.a.divergence() + x.b.divergence() + x.others.divergence();
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
