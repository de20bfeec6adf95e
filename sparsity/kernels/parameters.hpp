// Parameters: the penalty's slope, the optimizer's step, and lists of the entries that masks have left.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.hpp"

namespace kernels {

enum Penalty : int64_t { NONE, L1, HOYER, HS, GROUP_LASSO, GROUP_HS };
enum Optimizer : int64_t { ADAM, ADAMW, SGD };

// One parameter of one member, in the memory of the caller's tensors.
struct Tensor {
  float* value;
  float* first;         // the optimizer's state: Adam's means, or SGD's momentum
  float* second;        // Adam's means of squares
  const uint8_t* mask;  // 0: the gradient is 0 there; null: nowhere
  const float* added;   // a gradient that is computed elsewhere; null: none
  int64_t is_penalised;
};

// The numbers of the penalty and the optimizer, and of one step.
struct Rule {
  Penalty penalty;
  Optimizer kind;
  double beta1, beta2, eps, weight_decay, momentum, dampening;
  int64_t nesterov;
  double rate, decay;
  int64_t number;  // of steps before this one, since training began
};

// A thread's own part of what all threads do. Sums are of parts that there are as many of whatever the threads are, so
// that their number changes no bit.
constexpr int PARTS = 16;

struct Share {
  int thread, threads;
  int begin(int count) const { return int64_t(count) * thread / threads; }
  int end(int count) const { return int64_t(count) * (thread + 1) / threads; }
};

// The penalty, and decay times its gradient: sign * sgn(w) + (scale * w) * (base + rows[o] + columns[i]).
struct Slope {
  double value = 0;
  float sign = 0, scale = 1, base = 0;  // scale: a power of two near 1 / |w|, so that neither product leaves float32
  const float* rows = nullptr;
  const float* columns = nullptr;
};

// The optimizer's step on n entries by their gradients.
inline void move(const Rule& rule, int n, float* w, float* first, float* second, const float* gradient) {
  const float rate = rule.rate, weight_decay = rule.weight_decay;
  if (rule.kind == SGD) {
    const float momentum = rule.momentum, share = rule.number ? 1 - rule.dampening : 1,
                look = rule.nesterov ? momentum : 0;
    const float own = rule.nesterov || !momentum ? 1 : 0, kept = momentum ? 1 : 0;
#pragma omp simd
    for (int i = 0; i < n; i++) {
      const float g = gradient[i] + weight_decay * w[i];
      const float mean = first[i] * momentum + share * g;
      first[i] = kept * mean;
      w[i] -= rate * (own * g + (own ? look : kept) * mean);
    }
    return;
  }
  const double number = double(rule.number + 1);
  const float size = rule.rate / (1 - std::pow(rule.beta1, number));
  const float larger = 1 / std::sqrt(1 - std::pow(rule.beta2, number));
  const float share1 = 1 - rule.beta1, share2 = 1 - rule.beta2, beta2 = rule.beta2, eps = rule.eps;
  const float coupled = rule.kind == ADAM ? weight_decay : 0,
              kept = rule.kind == ADAM ? 1 : 1 - rule.rate * weight_decay;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const float g = gradient[i] + coupled * w[i];
    first[i] += share1 * (g - first[i]);
    second[i] = beta2 * second[i] + share2 * g * g;
    w[i] = kept * w[i] - size * first[i] / (std::sqrt(second[i]) * larger + eps);
  }
}

constexpr double LISTED_BELOW = 0.2;  // the share of entries left, below which a weight is a list of them
constexpr int CHUNK = 1024;           // entries of a list that are moved at once

class Parameter {
 public:
  // rows: outputs; columns: inputs times positions.
  Parameter(int rows, int columns, int positions) : rows(rows), columns(columns), positions(positions) {}
  // A vector is one row, whose entries are filters of one channel.
  explicit Parameter(int size) : rows(1), columns(size), positions(1), is_vector(true) {}

  // Takes the caller's tensor, as a list of what is left of it where that is little.
  void begin(const Tensor& given, const Rule& rule, int threads) {
    tensor = given;
    penalty = given.is_penalised ? rule.penalty : NONE;
    is_grouped = !is_vector && (penalty == GROUP_LASSO || penalty == GROUP_HS);
    if (!is_vector && is_sparse())
      make_list(rule);
    else
      places.clear();
    for (int part = 0; part <= PARTS; part++)
      bounds[part] = part < PARTS ? row_at(int64_t(is_listed() ? size() : rows) * part / PARTS) : rows;
    gradients.resize(threads);
    for (auto& each : gradients) each.resize(std::max(CHUNK, columns));
    row_sums.assign(2 * rows, {});
    if (!is_grouped) return;
    column_squares.assign(2 * PARTS * int64_t(columns), 0);
    slopes.resize(int64_t(threads) * (rows + columns));
  }

  // Gives back what lists have kept.
  void end(const Rule& rule) {
    for (size_t e = 0; e < places.size(); e++) {
      tensor.value[places[e]] = values[e];
      tensor.first[places[e]] = first[e];
      if (rule.kind != SGD) tensor.second[places[e]] = second[e];
    }
  }

  bool is_listed() const { return !places.empty(); }
  const float* row(int index) const { return tensor.value + int64_t(index) * columns; }
  int size() const { return places.size(); }
  int64_t left() const { return is_listed() ? size() : int64_t(rows) * columns; }  // entries that are multiplied by

  // The rows that a thread moves.
  int first_row(Share share) const { return bounds[share.begin(PARTS)]; }
  int last_row(Share share) const { return bounds[share.end(PARTS)]; }

  // Sums that the first step's penalty is made of.
  void measure(Share share) {
    forget(0, share);
    if (penalty == NONE) return;
    if (is_listed()) return add_list(0, starts[first_row(share)], starts[last_row(share)]);
    for (int o = first_row(share); o < last_row(share); o++) add(0, o);
  }

  // The penalty and its slope at the weights that there are before a step.
  Slope slope(int64_t step, Share share, const Rule& rule) {
    forget(step + 1, share);
    Slope found;
    if (penalty == NONE) return found;
    Sums all;
    for (int o = 0; o < rows; o++) all.size += sums(step, o).size, all.square += sums(step, o).square;
    if (!(all.square != 0)) return found;  // of zeros alone; NaN goes on
    const double norm = std::sqrt(all.square), decay = rule.decay, size = all.size;
    found.scale = std::ldexp(1.f, -std::clamp(std::ilogb(norm), -100, 100));
    double base = 0;
    if (is_grouped)
      base = slope_of_groups(found, step, share, decay, all.square);
    else if (penalty == L1)
      found.value = size, found.sign = decay;
    else if (penalty == GROUP_LASSO)
      found.value = size + norm, found.sign = decay, base = decay / norm;
    else if (penalty == HOYER)
      found.value = size / norm, found.sign = decay / norm, base = -decay * size / norm / all.square;
    else {
      found.value = size / norm * (size / norm) + (penalty == GROUP_HS);
      found.sign = 2 * decay * (size / all.square);
      base = -2 * decay * (size / norm) * (size / norm) / all.square;
    }
    found.base = base / found.scale;
    return found;
  }

  // Moves some entries of a row by their gradients, which it may change.
  void move_row(int64_t step, const Rule& rule, const Slope& slope, int row, float* gradient) {
    const int64_t start = int64_t(row) * columns;
    float* w = tensor.value + start;
    if (penalty != NONE)
      add_slope(columns, w, gradient, slope, slope.rows ? slope.base + slope.rows[row] : slope.base, slope.columns);
    if (tensor.added)
      for (int i = 0; i < columns; i++) gradient[i] += tensor.added[start + i];
    if (tensor.mask)
      for (int i = 0; i < columns; i++) gradient[i] = tensor.mask[start + i] ? gradient[i] : 0.f;
    move(rule, columns, w, tensor.first + start, tensor.second + start, gradient);
    if (penalty != NONE) add(step + 1, row);
  }

  // Moves the entries begin..end of a list by their gradients, which it may change.
  void move_list(int64_t step, const Rule& rule, const Slope& slope, int begin, int end, float* gradient) {
    const int n = end - begin;
    if (penalty != NONE) {
      float factors[CHUNK];
      if (is_grouped)
        for (int i = 0; i < n; i++) factors[i] = slope.rows[outputs[begin + i]] + slope.columns[inputs[begin + i]];
      add_slope(n, &values[begin], gradient, slope, slope.base, is_grouped ? factors : nullptr);
    }
    if (tensor.added)
      for (int i = 0; i < n; i++) gradient[i] += tensor.added[places[begin + i]];
    move(rule, n, &values[begin], &first[begin], &second[begin], gradient);
    if (penalty != NONE) add_list(step + 1, begin, end);
  }

  float* gradient(Share share) { return gradients[share.thread].get(); }

  // Of a list: by outputs for the forward pass, by inputs for the backward pass.
  std::vector<int> starts, outputs, inputs;  // entries of output o: starts[o] to starts[o + 1]; input: the column
  std::vector<int> input_starts, by_input;   // entries that read column i: by_input[input_starts[i]] and on
  std::vector<float> values;

 private:
  struct Sums {
    double size = 0, square = 0;  // of |w| and of w^2
  };

  bool is_sparse() const {
    if (!tensor.mask) return false;
    int64_t left = 0;
    const int64_t count = int64_t(rows) * columns;
    for (int64_t i = 0; i < count; i++) {
      left += tensor.mask[i];
      if (!tensor.mask[i] && tensor.value[i] != 0) return false;  // held at what it is, and heard
    }
    return left > 0 && left < LISTED_BELOW * count;
  }

  void make_list(const Rule& rule) {
    places.clear(), starts.assign(1, 0), outputs.clear(), inputs.clear();
    for (int o = 0; o < rows; o++) {
      for (int i = 0; i < columns; i++)
        if (tensor.mask[int64_t(o) * columns + i])
          places.push_back(o * int64_t(columns) + i), outputs.push_back(o), inputs.push_back(i);
      starts.push_back(places.size());
    }
    input_starts.assign(columns + 1, 0), by_input.resize(places.size());
    for (int each : inputs) input_starts[each + 1]++;
    for (int i = 0; i < columns; i++) input_starts[i + 1] += input_starts[i];
    std::vector<int> next(input_starts.begin(), input_starts.end() - 1);
    for (int e = 0; e < size(); e++) by_input[next[inputs[e]]++] = e;
    for (auto* each : {&values, &first, &second}) each->resize(places.size());
    for (int e = 0; e < size(); e++) {
      values[e] = tensor.value[places[e]];
      if (!tensor.first) continue;  // nothing is to be moved
      first[e] = tensor.first[places[e]];
      if (rule.kind != SGD) second[e] = tensor.second[places[e]];
    }
  }

  int row_at(int entry) const {
    return is_listed() ? std::lower_bound(starts.begin(), starts.end() - 1, entry) - starts.begin() : entry;
  }

  static void add_slope(int n, const float* w, float* gradient, const Slope& slope, float base, const float* more) {
    const float sign = slope.sign, scale = slope.scale;
    if (more)
#pragma omp simd
      for (int i = 0; i < n; i++) gradient[i] += w[i] * scale * (base + more[i]);
    else
#pragma omp simd
      for (int i = 0; i < n; i++) gradient[i] += (w[i] > 0 ? sign : w[i] < 0 ? -sign : 0.f) + w[i] * scale * base;
  }

  // The sums of a row, and the squares of a part's columns, of the weights before a step.
  Sums& sums(int64_t step, int row) { return row_sums[step % 2 * rows + row]; }
  double* squares(int64_t step, int part) { return &column_squares[(step % 2 * PARTS + part) * columns]; }

  // The sums of a thread's own rows start again.
  void forget(int64_t step, Share share) {
    for (int o = first_row(share); o < last_row(share); o++) sums(step, o) = {};
    if (is_grouped) std::fill(squares(step, share.begin(PARTS)), squares(step, share.end(PARTS)), 0);
  }

  double* squares_of_row(int64_t step, int row) {
    return squares(step, std::upper_bound(bounds, bounds + PARTS, row) - bounds - 1);
  }

  void add(int64_t step, int row) {
    const float* w = this->row(row);
    double size = 0, square = 0;
#pragma omp simd reduction(+ : size, square)
    for (int i = 0; i < columns; i++) size += std::abs(w[i]), square += double(w[i]) * w[i];
    sums(step, row) = {size, square};
    if (!is_grouped) return;
    double* own = squares_of_row(step, row);
    for (int i = 0; i < columns; i++) own[i] += double(w[i]) * w[i];
  }

  // One entry after the other, so that it does not matter where a chunk ends.
  void add_list(int64_t step, int begin, int end) {
    for (int e = begin; e < end; e++) {
      const double square = double(values[e]) * values[e];
      Sums& own = sums(step, outputs[e]);
      own.size += std::abs(values[e]), own.square += square;
      if (is_grouped) squares_of_row(step, outputs[e])[inputs[e]] += square;
    }
  }

  // Sets the slopes of rows (filters) and columns (channels), and the value; gives the base.
  double slope_of_groups(Slope& found, int64_t step, Share share, double decay, double square) {
    float* row_slopes = &slopes[int64_t(share.thread) * (rows + columns)];
    float* column_slopes = row_slopes + rows;
    std::vector<double> channels(columns / positions);
    for (int part = 0; part < PARTS; part++)
      for (int i = 0; i < columns; i++) channels[i / positions] += squares(step, part)[i];
    double filters_sum = 0, channels_sum = 0;
    for (int o = 0; o < rows; o++) filters_sum += std::sqrt(sums(step, o).square);
    for (double& each : channels) channels_sum += each = std::sqrt(each);
    const bool is_ratio = penalty == GROUP_HS;
    found.value =
        is_ratio ? (filters_sum * filters_sum + channels_sum * channels_sum) / square : filters_sum + channels_sum;
    const double of_filters = is_ratio ? 2 * decay * filters_sum / square : decay;
    const double of_channels = is_ratio ? 2 * decay * channels_sum / square : decay;
    auto quotient = [&](double factor, double norm) { return norm > 0 ? float(factor / norm / found.scale) : 0.f; };
    for (int o = 0; o < rows; o++) row_slopes[o] = quotient(of_filters, std::sqrt(sums(step, o).square));
    for (int i = 0; i < columns; i++) column_slopes[i] = quotient(of_channels, channels[i / positions]);
    found.rows = row_slopes, found.columns = column_slopes;
    return is_ratio ? -2 * decay * found.value / square : 0;
  }

  const int rows, columns, positions;
  const bool is_vector = false;
  Tensor tensor{};
  Penalty penalty = NONE;
  bool is_grouped = false;
  std::vector<int64_t> places;  // of a list's entries in the tensor
  std::vector<float> first, second;
  int bounds[PARTS + 1];                // rows of each part
  std::vector<Sums> row_sums;           // of the weights before this step and the next one
  std::vector<double> column_squares;   // the same, of each part
  std::vector<float> slopes;            // by thread: of rows, then of columns
  std::vector<Array<float>> gradients;  // by thread
};

}  // namespace kernels
