// Layers: forward and backward on groups of images, and the step of their parameters.
//
// What a layer takes and gives lies as [vector of images][unit][lane]: the batch is the vector axis of every operation.
#pragma once

#include <bit>
#include <type_traits>

#include "parameters.hpp"

namespace kernels {

// Which vectors of images a thread computes.
struct Range {
  int begin, end;
};

// Calls function<N>(first) for pieces of a count: of MOST each, and one of what is left.
template <int COUNT, int MOST, class Function>
inline void in_pieces(Function function) {
  for (int first = 0; first + MOST <= COUNT; first += MOST) function(std::integral_constant<int, MOST>(), first);
  if constexpr (COUNT % MOST != 0) function(std::integral_constant<int, COUNT % MOST>(), COUNT / MOST * MOST);
}

// The same for a range that is known at run time.
template <int MOST, class Function>
inline void in_pieces_of(Range range, Function function) {
  int first = range.begin;
  for (; first + MOST <= range.end; first += MOST) function(std::integral_constant<int, MOST>(), first);
  if constexpr (MOST > 1) in_pieces_of<MOST - 1>({first, range.end}, function);
}

// sums[r][v] += Σ w[r * row + k * column] * x[v * x_block + k], k < count; the sums lie in y.
template <int R, int V>
inline void multiply(const float* w, int64_t row, int64_t column, int count, const float* x, int64_t x_block, float* y,
                     int64_t y_block) {
  Vec sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = load(y + v * y_block + r * LANES);
  for (int k = 0; k < count; k++) {
    Vec in[V];
    for (int v = 0; v < V; v++) in[v] = load(x + v * x_block + k * LANES);
    for (int r = 0; r < R; r++) {
      const float each = w[r * row + k * column];
      for (int v = 0; v < V; v++) sums[r][v] += each * in[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(y + v * y_block + r * LANES, sums[r][v]);
}

// y[o] += Σ w[o * row + i * column] * x[i] of whole vectors, blocks of inputs staying in the fastest cache.
template <int OUT, int IN>
inline void product(const float* w, int64_t row, int64_t column, const float* x, float* y, Range range) {
  constexpr int BLOCK = 64;
  in_pieces_of<WIDEST>(range, [&](auto width, int v) {
    constexpr int V = width, R = std::min(SUMS / V, OUT);
    for (int i = 0; i < IN; i += BLOCK)
      in_pieces<OUT, R>([&](auto tile, int o) {
        multiply<tile, V>(w + o * row + i * column, row, column, std::min(BLOCK, IN - i),
                          x + (int64_t(v) * IN + i) * LANES, int64_t(IN) * LANES, y + (int64_t(v) * OUT + o) * LANES,
                          int64_t(OUT) * LANES);
      });
  });
}

inline void fill_rows(float* y, const float* bias, int count) {
  for (int o = 0; o < count; o++) store(y + o * LANES, all(bias ? bias[o] : 0.f));
}

// The bias of a layer, of which every output has so many positions.
template <int OUT, int POSITIONS>
class Bias {
 public:
  Parameter parameter{OUT};

  // Moves it by the gradients of the outputs: the last thread does, as the rows before are cut so that it has least.
  void update(const float* dy, int vectors, int64_t step, Share share, const Rule& rule) {
    const Slope slope = parameter.slope(step, share, rule);
    if (share.thread == 0) value = slope.value;
    if (share.thread != share.threads - 1) return;
    float* gradient = parameter.gradient(share);
    for (int o = 0; o < OUT; o++) {
      constexpr int APART = std::min(POSITIONS, 8);  // sums that do not wait for each other
      Vec sums[APART] = {};
      for (int v = 0; v < vectors; v++)
        in_pieces<POSITIONS, APART>([&](auto piece, int p) {
          const float* from = dy + ((int64_t(v) * OUT + o) * POSITIONS + p) * LANES;
          for (int k = 0; k < piece; k++) sums[k] += load(from + k * LANES);
        });
      for (int k = 1; k < APART; k++) sums[0] += sums[k];
      gradient[o] = sum(sums[0]);
    }
    parameter.move_row(step, rule, slope, 0, gradient);
  }

  double value = 0;  // the penalty
};

template <int IN, int OUT, bool HAS_BIAS = true>
class Linear {
 public:
  static constexpr int INPUTS = IN, OUTPUTS = OUT, PARAMETERS = 1 + HAS_BIAS;
  static constexpr bool IN_PLACE = false, IS_WIDE = true;

  Parameter* parameter(int index) { return index ? &bias.parameter : &weight; }
  double value() const { return penalty + bias.value; }
  int64_t products() const { return weight.left(); }

  void resize(int vectors) { turned.resize(int64_t(vectors) * LANES * WIDTH); }

  void forward(const float* x, float* y, Range range) {
    for (int v = range.begin; v < range.end; v++)
      fill_rows(y + int64_t(v) * OUT * LANES, HAS_BIAS ? bias.parameter.row(0) : nullptr, OUT);
    if (weight.is_listed()) return forward_list(x, y, range);
    product<OUT, IN>(weight.row(0), IN, 1, x, y, range);
  }

  // What the update reads beside the inputs.
  void keep(const float* x, Range range) {
    if (weight.is_listed()) return;
    for (int v = range.begin; v < range.end; v++)
      turn_images(x + int64_t(v) * IN * LANES, &turned[int64_t(v) * LANES * WIDTH]);
  }

  // Whether anything depends on an input.
  bool reads(int input) const {
    return !weight.is_listed() || weight.input_starts[input] < weight.input_starts[input + 1];
  }

  void backward(const float*, const float*, const float* dy, float* dx, Range range, int) {
    std::memset(dx + int64_t(range.begin) * IN * LANES, 0,
                int64_t(range.end - range.begin) * IN * LANES * sizeof(float));
    if (!weight.is_listed()) return product<IN, OUT>(weight.row(0), 1, IN, dy, dx, range);
    in_pieces_of<8>(range, [&](auto width, int v) {
      constexpr int V = width;
      for (int i = 0; i < IN; i++) {
        const int begin = weight.input_starts[i], end = weight.input_starts[i + 1];
        if (begin == end) continue;
        Vec sums[V] = {};
        for (int q = begin; q < end; q++) {
          const int e = weight.by_input[q];
          const float* from = dy + (int64_t(v) * OUT + weight.outputs[e]) * LANES;
          for (int k = 0; k < V; k++) sums[k] += weight.values[e] * load(from + int64_t(k) * OUT * LANES);
        }
        for (int k = 0; k < V; k++) store(dx + (int64_t(v + k) * IN + i) * LANES, sums[k]);
      }
    });
  }

  void update(const float* x, const float* dy, int images, int vectors, int64_t step, Share share, const Rule& rule) {
    const Slope slope = weight.slope(step, share, rule);
    if (share.thread == 0) penalty = slope.value;
    if (HAS_BIAS) bias.update(dy, vectors, step, share, rule);
    if (weight.is_listed()) return update_list(x, dy, vectors, step, share, rule, slope);
    constexpr int R = 4;
    Array<float>& rows = scratch[share.thread];
    const int last = weight.last_row(share);
    for (int o = weight.first_row(share); o < last; o += R) {
      const int count = std::min(R, last - o);
      if (count == R)
        gradients<R>(dy, o, images, rows.get());
      else
        for (int r = 0; r < count; r++) gradients<1>(dy, o + r, images, rows.get() + r * WIDTH);
      for (int r = 0; r < count; r++) weight.move_row(step, rule, slope, o + r, rows.get() + r * WIDTH);
    }
  }

  void begin(int threads) {
    scratch.resize(threads);
    for (auto& each : scratch) each.resize(4 * WIDTH);
  }

 private:
  static constexpr int WIDTH = up_to(IN, LANES);

  void forward_list(const float* x, float* y, Range range) {
    in_pieces_of<8>(range, [&](auto width, int v) {
      constexpr int V = width;
      for (int o = 0; o < OUT; o++) {
        Vec sums[V];
        for (int k = 0; k < V; k++) sums[k] = load(y + (int64_t(v + k) * OUT + o) * LANES);
        for (int e = weight.starts[o]; e < weight.starts[o + 1]; e++) {
          const float* from = x + (int64_t(v) * IN + weight.inputs[e]) * LANES;
          for (int k = 0; k < V; k++) sums[k] += weight.values[e] * load(from + int64_t(k) * IN * LANES);
        }
        for (int k = 0; k < V; k++) store(y + (int64_t(v + k) * OUT + o) * LANES, sums[k]);
      }
    });
  }

  void update_list(const float* x, const float* dy, int vectors, int64_t step, Share share, const Rule& rule,
                   const Slope& slope) {
    if (vectors == 7) return update_list_of<7>(x, dy, vectors, step, share, rule, slope);  // batches of 100
    if (vectors == 8) return update_list_of<8>(x, dy, vectors, step, share, rule, slope);  // and of 128
    update_list_of<0>(x, dy, vectors, step, share, rule, slope);
  }

  template <int COUNT>
  void update_list_of(const float* x, const float* dy, int vectors, int64_t step, Share share, const Rule& rule,
                      const Slope& slope) {
    float* gradient = weight.gradient(share);
    const int last = weight.starts[weight.last_row(share)];
    for (int begin = weight.starts[weight.first_row(share)]; begin < last; begin += CHUNK) {
      const int end = std::min(last, begin + CHUNK);
      for (int e = begin; e < end; e += LANES) {
        Vec found[LANES] = {};
        for (int k = 0; k < std::min(LANES, end - e); k++) found[k] = gradients_of<COUNT>(x, dy, vectors, e + k);
        store(gradient + e - begin, sums(found));
      }
      weight.move_list(step, rule, slope, begin, end, gradient);
    }
  }

  // Of an entry: Σ dy * x over COUNT vectors of images, or so many; by lanes, in two sums that do not wait for each
  // other.
  template <int COUNT>
  Vec gradients_of(const float* x, const float* dy, int vectors, int e) const {
    const float *one = dy + weight.outputs[e] * LANES, *other = x + weight.inputs[e] * LANES;
    const int count = COUNT ? COUNT : vectors;
    auto of = [&](int v) { return load(one + int64_t(v) * OUT * LANES) * load(other + int64_t(v) * IN * LANES); };
    Vec even{}, odd{};
    for (int v = 0; v + 1 < count; v += 2) even += of(v), odd += of(v + 1);
    if (count % 2) even += of(count - 1);
    return even + odd;
  }

  // [input][lane] to [image][input].
  static void turn_images(const float* x, float* to) {
    for (int i = 0; i < IN; i += LANES) {
      Vec rows[LANES];
      for (int k = 0; k < LANES; k++) rows[k] = i + k < IN ? load(x + (i + k) * LANES) : Vec{};
      turn<Vec, LANES>(rows);
      for (int k = 0; k < LANES; k++) store(to + k * WIDTH + i, rows[k]);
    }
  }

  // gradients[r][i] = Σ dy[o + r] * x[i] over images.
  template <int R>
  void gradients(const float* dy, int o, int images, float* to) const {
    in_pieces<WIDTH / LANES, std::min(SUMS / R, WIDTH / LANES)>([&](auto tile, int first) {
      constexpr int C = tile;
      Vec sums[R][C] = {};
      const float* x = turned.get() + first * LANES;
      for (int image = 0; image < images; image++, x += WIDTH) {
        const float* from = dy + (int64_t(image / LANES) * OUT + o) * LANES + image % LANES;
        Vec in[C];
        for (int c = 0; c < C; c++) in[c] = load(x + c * LANES);
        for (int r = 0; r < R; r++) {
          const float each = from[r * LANES];
          for (int c = 0; c < C; c++) sums[r][c] += each * in[c];
        }
      }
      for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(to + r * WIDTH + (first + c) * LANES, sums[r][c]);
    });
  }

  Parameter weight{OUT, IN, 1};
  Bias<OUT, 1> bias;
  double penalty = 0;
  Array<float> turned;  // the inputs [image][input]
  std::vector<Array<float>> scratch;
};

// A convolution of maps that are padded already, in one group.
//
// After ReLU and pooling most gradients of its outputs are 0. Where a row of the kernel is long enough to be vectors
// itself, the backward pass gathers the others alone, from images and weights whose channels lie last.
template <int CHANNELS, int HEIGHT, int WIDTH, int FILTERS, int KH, int KW, int SH, int SW, int DH, int DW,
          bool HAS_BIAS = true>
class Convolution {
 public:
  static constexpr int OH = (HEIGHT - DH * (KH - 1) - 1) / SH + 1, OW = (WIDTH - DW * (KW - 1) - 1) / SW + 1;
  static constexpr int INPUTS = CHANNELS * HEIGHT * WIDTH, OUTPUTS = FILTERS * OH * OW, PARAMETERS = 1 + HAS_BIAS;
  static constexpr bool IN_PLACE = false, IS_WIDE = false;

  Parameter* parameter(int index) { return index ? &bias.parameter : &weight; }
  double value() const { return penalty + bias.value; }
  int64_t products() const { return weight.left() * OH * OW; }
  void resize(int vectors) {
    if (GATHERS && !weight.is_listed()) images.resize(int64_t(vectors) * LANES * INPUTS + ROW);
  }
  void begin(int threads) {
    places.resize(weight.size());
    for (int e = 0; e < weight.size(); e++) places[e] = place(weight.inputs[e]);
    gathered.resize(threads);
    if (!GATHERS || weight.is_listed()) return;
    kernels.resize(FILTERS * KH * ROW);
    for (int o = 0; o < FILTERS; o++) keep_kernel(o);
    for (auto& each : gathered) {
      each.offsets.resize(FILTERS * OH * OW), each.values.resize(FILTERS * OH * OW), each.starts.resize(OH * OW + 1);
      each.image.resize(LANES * INPUTS + ROW), each.rows.resize(FILTERS * KH * ROW);
      each.slopes.resize(LANES * std::max(FILTERS * up_to(OH * OW, LANES), OH * OW * up_to(FILTERS, LANES)));
    }
  }

  void forward(const float* x, float* y, Range range) {
    for (int v = range.begin; v < range.end; v++) {
      const float* in = x + int64_t(v) * INPUTS * LANES;
      float* out = y + int64_t(v) * OUTPUTS * LANES;
      if (weight.is_listed())
        for (int o = 0; o < FILTERS; o++) forward_list(in, out, o);
      else
        in_pieces<FILTERS, TILE>([&](auto tile, int o) { forward_tile<tile>(in, out, o); });
    }
  }

  // What the update reads beside the inputs.
  void keep(const float* x, Range range) {
    if (!GATHERS || weight.is_listed()) return;
    for (int v = range.begin; v < range.end; v++)
      put_channels_last(x + int64_t(v) * INPUTS * LANES, &images[int64_t(v) * LANES * INPUTS]);
  }

  bool reads(int) const { return true; }

  void backward(const float*, const float*, const float* dy, float* dx, Range range, int thread) {
    for (int v = range.begin; v < range.end; v++) {
      const float* from = dy + int64_t(v) * OUTPUTS * LANES;
      float* to = dx + int64_t(v) * INPUTS * LANES;
      if (GATHERS && !weight.is_listed()) {
        gather_inputs(from, to, gathered[thread]);
        continue;
      }
      std::memset(to, 0, INPUTS * LANES * sizeof(float));
      if (weight.is_listed())
        backward_list(from, to);
      else
        in_pieces<CHANNELS, std::min(TILE, CHANNELS)>([&](auto tile, int c) { backward_tile<tile>(from, to, c); });
    }
  }

  void update(const float* x, const float* dy, int, int vectors, int64_t step, Share share, const Rule& rule) {
    const Slope slope = weight.slope(step, share, rule);
    if (share.thread == 0) penalty = slope.value;
    if (HAS_BIAS) bias.update(dy, vectors, step, share, rule);
    float* gradient = weight.gradient(share);
    const int first = weight.first_row(share), last = weight.last_row(share);
    if (!weight.is_listed()) {
      if constexpr (GATHERS) gather_weights(dy, vectors, first, last, gathered[share.thread]);
      for (int o = first; o < last; o++) {
        if constexpr (GATHERS)
          put_in_order(&gathered[share.thread].rows[(o - first) * KH * ROW], gradient);
        else
          gradients_of_row(x, dy, vectors, o, gradient);
        weight.move_row(step, rule, slope, o, gradient);
        if constexpr (GATHERS) keep_kernel(o);
      }
      return;
    }
    for (int begin = weight.starts[first]; begin < weight.starts[last]; begin += CHUNK) {
      const int end = std::min(weight.starts[last], begin + CHUNK);
      for (int e = begin; e < end;) {
        int count = 1;  // entries of one filter
        while (count < AT_ONCE && e + count < end && weight.outputs[e + count] == weight.outputs[e]) count++;
        of_entries<AT_ONCE>(count, x, dy, vectors, e, gradient + e - begin);
        e += count;
      }
      weight.move_list(step, rule, slope, begin, end, gradient);
    }
  }

 private:
  static constexpr int ALONG = std::min(OW, LANES == 4 ? 4 : 8);  // positions of a row that are computed at once
  static constexpr int TILE = std::max(1, std::min(SUMS / ALONG, FILTERS));

  // The first input that an entry of a filter's row reads.
  static constexpr int place(int column) {
    const int c = column / (KH * KW), kh = column / KW % KH, kw = column % KW;
    return (c * HEIGHT + kh * DH) * WIDTH + kw * DW;
  }

  template <int R>
  void forward_tile(const float* in, float* out, int o) const {
    for (int row = 0; row < OH; row++)
      in_pieces<OW, ALONG>([&](auto along, int column) {
        constexpr int P = along;
        Vec sums[R][P];
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) sums[r][p] = all(HAS_BIAS ? bias.parameter.row(0)[o + r] : 0.f);
        const float* w = weight.row(o);
        for (int c = 0; c < CHANNELS; c++)
          for (int kh = 0; kh < KH; kh++) {
            const float* from = in + ((c * HEIGHT + row * SH + kh * DH) * WIDTH + column * SW) * LANES;
            for (int kw = 0; kw < KW; kw++, w++, from += DW * LANES) {
              Vec x[P];
              for (int p = 0; p < P; p++) x[p] = load(from + p * SW * LANES);
              for (int r = 0; r < R; r++) {
                const float each = w[r * COLUMNS];
                for (int p = 0; p < P; p++) sums[r][p] += each * x[p];
              }
            }
          }
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) store(out + (((o + r) * OH + row) * OW + column + p) * LANES, sums[r][p]);
      });
  }

  void forward_list(const float* in, float* out, int o) const {
    for (int row = 0; row < OH; row++)
      in_pieces<OW, std::min(OW, SUMS)>([&](auto along, int column) {
        constexpr int P = along;
        Vec sums[P];
        for (int p = 0; p < P; p++) sums[p] = all(HAS_BIAS ? bias.parameter.row(0)[o] : 0.f);
        const float* start = in + (row * SH * WIDTH + column * SW) * LANES;
        for (int e = weight.starts[o]; e < weight.starts[o + 1]; e++) {
          const float* from = start + places[e] * LANES;
          for (int p = 0; p < P; p++) sums[p] += weight.values[e] * load(from + p * SW * LANES);
        }
        for (int p = 0; p < P; p++) store(out + ((o * OH + row) * OW + column + p) * LANES, sums[p]);
      });
  }

  // What the outputs' gradients give R channels, each tap of the kernel to its own inputs.
  template <int R>
  void backward_tile(const float* dy, float* dx, int c) const {
    for (int kh = 0; kh < KH; kh++)
      for (int kw = 0; kw < KW; kw++)
        for (int row = 0; row < OH; row++)
          in_pieces<OW, ALONG>([&](auto along, int column) {
            constexpr int P = along;
            Vec sums[R][P] = {};
            const float* w = weight.row(0) + (c * KH + kh) * KW + kw;
            const float* from = dy + (row * OW + column) * LANES;
            for (int o = 0; o < FILTERS; o++, w += COLUMNS, from += OH * OW * LANES) {
              Vec in[P];
              for (int p = 0; p < P; p++) in[p] = load(from + p * LANES);
              for (int r = 0; r < R; r++) {
                const float each = w[r * KH * KW];
                for (int p = 0; p < P; p++) sums[r][p] += each * in[p];
              }
            }
            for (int r = 0; r < R; r++)
              for (int p = 0; p < P; p++) {
                float* to =
                    dx + (((c + r) * HEIGHT + row * SH + kh * DH) * WIDTH + (column + p) * SW + kw * DW) * LANES;
                store(to, load(to) + sums[r][p]);
              }
          });
  }

  // Each row of inputs takes what all entries of one column of the kernel give it, before the next column does.
  void backward_list(const float* dy, float* dx) const {
    for (int c = 0; c < CHANNELS; c++)
      for (int kw = 0; kw < KW; kw++)
        for (int y = 0; y < HEIGHT; y++)
          in_pieces<OW, std::min(OW, SUMS)>([&](auto along, int column) {
            constexpr int P = along;
            float* to = dx + ((c * HEIGHT + y) * WIDTH + column * SW + kw * DW) * LANES;
            Vec sums[P];
            for (int p = 0; p < P; p++) sums[p] = load(to + p * SW * LANES);
            for (int kh = 0; kh < KH; kh++) {
              const int row = (y - kh * DH) / SH, tap = (c * KH + kh) * KW + kw;
              if (y < kh * DH || row >= OH || row * SH != y - kh * DH) continue;
              for (int q = weight.input_starts[tap]; q < weight.input_starts[tap + 1]; q++) {
                const int e = weight.by_input[q];
                const float* from = dy + ((weight.outputs[e] * OH + row) * OW + column) * LANES;
                for (int p = 0; p < P; p++) sums[p] += weight.values[e] * load(from + p * LANES);
              }
            }
            for (int p = 0; p < P; p++) store(to + p * SW * LANES, sums[p]);
          });
  }

  // The gradients of a filter, some rows of its kernel at once.
  static void gradients_of_row(const float* x, const float* dy, int vectors, int o, float* gradient) {
    for (int c = 0; c < CHANNELS; c++)
      in_pieces<KW, std::min(KW, 8)>([&](auto taps, int kw) {
        constexpr int N = taps;
        in_pieces<KH, std::clamp(SUMS / N, 1, KH)>([&](auto rows, int kh) {
          constexpr int R = rows;
          float found[R * N];
          gradients<R, N>(x, dy, vectors, o, place((c * KH + kh) * KW + kw), found);
          for (int r = 0; r < R; r++)
            std::copy(found + r * N, found + (r + 1) * N, gradient + (c * KH + kh + r) * KW + kw);
        });
      });
  }

  static constexpr int AT_ONCE = std::min(8, SUMS);

  // The gradients of COUNT entries of one filter or, where they are fewer, of so many.
  template <int COUNT>
  void of_entries(int count, const float* x, const float* dy, int vectors, int e, float* to) const {
    if constexpr (COUNT > 1)
      if (count < COUNT) return of_entries<COUNT - 1>(count, x, dy, vectors, e, to);
    Vec sums[COUNT] = {};
    for (int v = 0; v < vectors; v++) {
      const float* out = dy + (int64_t(v) * FILTERS + weight.outputs[e]) * OH * OW * LANES;
      const float* in[COUNT];
      for (int k = 0; k < COUNT; k++) in[k] = x + (int64_t(v) * INPUTS + places[e + k]) * LANES;
      for (int row = 0; row < OH; row++)
        for (int column = 0; column < OW; column++, out += LANES) {
          const Vec each = load(out);
          for (int k = 0; k < COUNT; k++) sums[k] += each * load(in[k] + (row * SH * WIDTH + column * SW) * LANES);
        }
    }
    for (int k = 0; k < COUNT; k++) to[k] = sum(sums[k]);
  }

  // Σ dy[o] * x over positions and images, for rows of taps from a first input on.
  template <int R, int N>
  static void gradients(const float* x, const float* dy, int vectors, int o, int first, float* to) {
    Vec sums[R][N] = {};
    for (int v = 0; v < vectors; v++) {
      const float* out = dy + (int64_t(v) * FILTERS + o) * OH * OW * LANES;
      for (int row = 0; row < OH; row++) {
        const float* in = x + (int64_t(v) * INPUTS + first + row * SH * WIDTH) * LANES;
        for (int column = 0; column < OW; column++, out += LANES, in += SW * LANES) {
          const Vec each = load(out);
          for (int r = 0; r < R; r++)
            for (int k = 0; k < N; k++) sums[r][k] += each * load(in + (r * DH * WIDTH + k * DW) * LANES);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int k = 0; k < N; k++) to[r * N + k] = sum(sums[r][k]);
  }

  // --- gathering what is not 0
  // ------------------------------------------------------------------------------------------

  // Of one thread: the outputs' gradients of some images, those that are not 0 and what they go with, and what they
  // come to, for the inputs and for the kernels.
  struct Gathered {
    Array<float> slopes, image, rows;
    std::vector<int> offsets, starts;
    std::vector<float> values;
  };

  static constexpr bool GATHERS = DW == 1 && CHANNELS * KW >= 2 * LANES;
  static constexpr int ROW = up_to(CHANNELS * KW, LANES);  // a row of a kernel, channels last

  static void put_channels_last(const float* x, float* to) {
    for (int first = 0; first < INPUTS; first += LANES) {
      Vec rows[LANES] = {};
      for (int k = 0; k < std::min(LANES, INPUTS - first); k++) rows[k] = load(x + unit(first + k) * LANES);
      turn<Vec, LANES>(rows);
      for (int lane = 0; lane < LANES; lane++)
        std::memcpy(to + lane * INPUTS + first, &rows[lane], std::min(LANES, INPUTS - first) * sizeof(float));
    }
  }

  static void put_channels_first(const float* from, float* dx) {
    for (int first = 0; first < INPUTS; first += LANES) {
      Vec rows[LANES];
      for (int lane = 0; lane < LANES; lane++) rows[lane] = load(from + lane * INPUTS + first);
      turn<Vec, LANES>(rows);
      for (int k = 0; k < std::min(LANES, INPUTS - first); k++) store(dx + unit(first + k) * LANES, rows[k]);
    }
  }

  // The unit that lies at a place where channels lie last.
  static constexpr int unit(int place) { return place % CHANNELS * (HEIGHT * WIDTH) + place / CHANNELS; }

  // The kernel of a filter with channels last, zeros behind each row.
  void keep_kernel(int o) {
    const float* w = weight.row(o);
    float* to = &kernels[o * KH * ROW];
    for (int c = 0; c < CHANNELS; c++)
      for (int kh = 0; kh < KH; kh++)
        for (int kw = 0; kw < KW; kw++) to[kh * ROW + kw * CHANNELS + c] = *w++;
  }

  // sums[kh][i] += values[e] * from[offsets[e] + kh * row + i], for R rows.
  template <int R>
  static void gather(const float* from, int row, const int* offsets, const float* values, int count, float* sums,
                     int sums_row) {
    constexpr int V = ROW / LANES;
    in_pieces<V, std::min(V, SUMS)>([&](auto width, int v) {
      constexpr int N = width;
      const float* start = from + v * LANES;
      float* to = sums + v * LANES;
      Vec found[R][N];
      for (int r = 0; r < R; r++)
        for (int k = 0; k < N; k++) found[r][k] = load(to + r * sums_row + k * LANES);
      for (int e = 0; e < count; e++) {
        const float each = values[e];
        const float* own = start + offsets[e];
        for (int r = 0; r < R; r++)
          for (int k = 0; k < N; k++) found[r][k] += each * load(own + r * row + k * LANES);
      }
      for (int r = 0; r < R; r++)
        for (int k = 0; k < N; k++) store(to + r * sums_row + k * LANES, found[r][k]);
    });
  }

  // The gradients of the filters first..last, one image after the other, so that it stays in the fastest cache.
  void gather_weights(const float* dy, int vectors, int first, int last, Gathered& own) const {
    constexpr int POSITIONS = up_to(OH * OW, LANES);
    std::memset(own.rows.get(), 0, int64_t(last - first) * KH * ROW * sizeof(float));
    for (int v = 0; v < vectors; v++) {
      for (int o = first; o < last; o++)
        put_images_first<OH * OW>(dy + (int64_t(v) * FILTERS + o) * OH * OW * LANES, 1,
                                  &own.slopes[(o - first) * POSITIONS], (last - first) * POSITIONS);
      for (int lane = 0; lane < LANES; lane++)
        for (int o = first; o < last; o++) {
          int count = 0;
          for_each_other_than_zero<POSITIONS>(
              &own.slopes[(lane * (last - first) + o - first) * POSITIONS],
              [&](int position, float value) { own.offsets[count] = corner(position), own.values[count++] = value; });
          const float* image = &images[(int64_t(v) * LANES + lane) * INPUTS];
          in_pieces<KH, std::clamp(SUMS / (ROW / LANES), 1, KH)>([&](auto tall, int kh) {
            gather<tall>(image + kh * DH * WIDTH * CHANNELS, DH * WIDTH * CHANNELS, own.offsets.data(),
                         own.values.data(), count, &own.rows[((o - first) * KH + kh) * ROW], ROW);
          });
        }
    }
  }

  // The gradients of the inputs of a vector of images, a few rows of all kernels after the other, for the same reason.
  void gather_inputs(const float* dy, float* dx, Gathered& own) const {
    constexpr int WIDE = up_to(FILTERS, LANES);
    for (int position = 0; position < OH * OW; position++)
      put_images_first<FILTERS>(dy + position * LANES, OH * OW, &own.slopes[position * WIDE], OH * OW * WIDE);
    float* image = own.image.get();
    std::memset(image, 0, LANES * INPUTS * sizeof(float));
    for (int lane = 0; lane < LANES; lane++, image += INPUTS) {
      int count = 0;
      for (int position = 0; position < OH * OW; position++) {
        for_each_other_than_zero<WIDE>(&own.slopes[(lane * OH * OW + position) * WIDE], [&](int o, float value) {
          own.offsets[count] = o * KH * ROW, own.values[count++] = value;
        });
        own.starts[position + 1] = count;
      }
      in_pieces<KH, std::clamp(8 * LANES / ROW, 1, KH)>([&](auto tall, int kh) {
        for (int column = 0; column < OW; column++)  // down the columns: what was just written is not read at once
          for (int position = column; position < OH * OW; position += OW) {
            const int start = own.starts[position], more = own.starts[position + 1] - start;
            if (more)
              gather<tall>(&kernels[kh * ROW], ROW, &own.offsets[start], &own.values[start], more,
                           image + corner(position) + kh * DH * WIDTH * CHANNELS, DH * WIDTH * CHANNELS);
          }
      });
    }
    put_channels_first(own.image.get(), dx);
  }

  // COUNT vectors of images that lie so many vectors apart: of each image its numbers, one after the other.
  template <int COUNT>
  static void put_images_first(const float* from, int apart, float* to, int image) {
    for (int first = 0; first < COUNT; first += LANES) {
      Vec rows[LANES];
      for (int k = 0; k < LANES; k++)
        rows[k] = first + k < COUNT ? load(from + int64_t(first + k) * apart * LANES) : Vec{};
      turn<Vec, LANES>(rows);
      for (int lane = 0; lane < LANES; lane++) store(to + int64_t(lane) * image + first, rows[lane]);
    }
  }

  // Calls a function of the place and the value of each of COUNT numbers, whole vectors of them, that is not 0.
  template <int COUNT, class Function>
  static void for_each_other_than_zero(const float* from, Function function) {
    for (int first = 0; first < COUNT; first += 64) {
      uint64_t left = 0;
      for (int k = 0; k < std::min(64, COUNT - first); k += LANES)
        left |= uint64_t(other_than_zero(load(from + first + k))) << k;
      for (; left; left &= left - 1) {
        const int place = first + __builtin_ctzll(left);
        function(place, from[place]);
      }
    }
  }

  // A kernel with channels last to its own order.
  static void put_in_order(const float* rows, float* to) {
    for (int c = 0; c < CHANNELS; c++)
      for (int kh = 0; kh < KH; kh++)
        for (int kw = 0; kw < KW; kw++) *to++ = rows[kh * ROW + kw * CHANNELS + c];
  }

  // Where the window of an output begins, channels last.
  static constexpr int corner(int position) { return (position / OW * SH * WIDTH + position % OW * SW) * CHANNELS; }

  static constexpr int COLUMNS = CHANNELS * KH * KW;
  Parameter weight{FILTERS, COLUMNS, KH * KW};
  Bias<FILTERS, OH * OW> bias;
  double penalty = 0;
  std::vector<int> places;       // of a list's entries: the first input that each reads
  Array<float> images, kernels;  // with channels last
  std::vector<Gathered> gathered;
};

// What layers without parameters have in common.
template <int IN, int OUT>
class Plain {
 public:
  static constexpr int INPUTS = IN, OUTPUTS = OUT, PARAMETERS = 0;
  static constexpr bool IN_PLACE = false, IS_WIDE = false;
  Parameter* parameter(int) { return nullptr; }
  double value() const { return 0; }
  int64_t products() const { return 0; }  // multiplications for an image
  void resize(int) {}
  void begin(int) {}
  void keep(const float*, Range) {}
  bool reads(int) const { return true; }
  void update(const float*, const float*, int, int, int64_t, Share, const Rule&) {}
};

// x where it is above 0, slope * x elsewhere; SLOPE: its bits.
template <int UNITS, uint32_t SLOPE = 0>
class Rectifier : public Plain<UNITS, UNITS> {
 public:
  static constexpr bool IN_PLACE = true;
  static constexpr float slope = std::bit_cast<float>(SLOPE);

  void forward(const float* x, float* y, Range range) {
    for (int64_t at = int64_t(range.begin) * UNITS * LANES; at < int64_t(range.end) * UNITS * LANES; at += LANES) {
      const Vec in = load(x + at);
      store(y + at, in <= 0.f ? (SLOPE ? slope * in : Vec{}) : in);  // NaN stays
    }
  }

  void backward(const float*, const float* y, const float* dy, float* dx, Range range, int) {
    for (int64_t at = int64_t(range.begin) * UNITS * LANES; at < int64_t(range.end) * UNITS * LANES; at += LANES) {
      const Vec out = load(y + at), gradient = load(dy + at);
      store(dx + at, out <= 0.f ? (SLOPE ? slope * gradient : Vec{}) : gradient);
    }
  }
};

// Zeros around maps.
template <int CHANNELS, int HEIGHT, int WIDTH, int PH, int PW>
class Padding : public Plain<CHANNELS * HEIGHT * WIDTH, CHANNELS*(HEIGHT + 2 * PH) * (WIDTH + 2 * PW)> {
 public:
  void forward(const float* x, float* y, Range range) {
    for (int v = range.begin; v < range.end; v++) {
      std::memset(y + int64_t(v) * Padding::OUTPUTS * LANES, 0, Padding::OUTPUTS * LANES * sizeof(float));
      for (int row = 0; row < CHANNELS * HEIGHT; row++) std::memcpy(y + outer(v, row), x + inner(v, row), BYTES);
    }
  }

  void backward(const float*, const float*, const float* dy, float* dx, Range range, int) {
    for (int v = range.begin; v < range.end; v++)
      for (int row = 0; row < CHANNELS * HEIGHT; row++) std::memcpy(dx + inner(v, row), dy + outer(v, row), BYTES);
  }

 private:
  static constexpr int BYTES = WIDTH * LANES * sizeof(float);
  static int64_t inner(int v, int row) { return (int64_t(v) * CHANNELS * HEIGHT + row) * WIDTH * LANES; }
  static int64_t outer(int v, int row) {
    const int64_t padded = (int64_t(v) * CHANNELS + row / HEIGHT) * (HEIGHT + 2 * PH) + row % HEIGHT + PH;
    return (padded * (WIDTH + 2 * PW) + PW) * LANES;
  }
};

// Pooling of windows within the maps: their largest entries, the first of equals, or their means.
template <int CHANNELS, int HEIGHT, int WIDTH, int KH, int KW, int SH, int SW, bool IS_MAX>
class Pooling : public Plain<CHANNELS * HEIGHT * WIDTH, CHANNELS*((HEIGHT - KH) / SH + 1) * ((WIDTH - KW) / SW + 1)> {
 public:
  static constexpr int OH = (HEIGHT - KH) / SH + 1, OW = (WIDTH - KW) / SW + 1;

  void resize(int vectors) {
    if (IS_MAX) largest.resize(int64_t(vectors) * Pooling::OUTPUTS * LANES);
  }

  void forward(const float* x, float* y, Range range) {
    each(range, [&](int64_t in, int64_t out) {
      Vec found = load(x + in * LANES);
      Ints which{};
      for (int k = 1; k < KH * KW; k++) {
        const Vec next = load(x + (in + k / KW * WIDTH + k % KW) * LANES);
        if (IS_MAX) {
          const Ints is_larger = (next > found) | (next != next);  // NaN is larger than all, as torch has it
          found = is_larger ? next : found;
          which = is_larger ? Ints{} + k : which;
        } else {
          found += next;
        }
      }
      if (IS_MAX) {
        const Bytes narrow = __builtin_convertvector(which, Bytes);
        std::memcpy(&largest[out * LANES], &narrow, sizeof narrow);
      }
      store(y + out * LANES, IS_MAX ? found : found * (1.f / (KH * KW)));
    });
  }

  void backward(const float*, const float*, const float* dy, float* dx, Range range, int) {
    const int64_t size = int64_t(Pooling::INPUTS) * LANES;
    if (!IS_TILED) std::memset(dx + range.begin * size, 0, (range.end - range.begin) * size * sizeof(float));
    each(range, [&](int64_t in, int64_t out) {
      const Vec gradient = load(dy + out * LANES);
      Ints which{};
      if (IS_MAX) {
        Bytes narrow;
        std::memcpy(&narrow, &largest[out * LANES], sizeof narrow);
        which = __builtin_convertvector(narrow, Ints);
      }
      for (int k = 0; k < KH * KW; k++) {
        float* to = dx + (in + k / KW * WIDTH + k % KW) * LANES;
        const Vec own = IS_MAX ? (which == k ? gradient : Vec{}) : gradient * (1.f / (KH * KW));
        store(to, IS_TILED ? own : load(to) + own);
      }
    });
  }

 private:
  // Whether each input is in one window.
  static constexpr bool IS_TILED = KH == SH && KW == SW && HEIGHT % KH == 0 && WIDTH % KW == 0;

  // Calls a function of the first input of each window, and of its output.
  template <class Function>
  static void each(Range range, Function function) {
    for (int64_t map = int64_t(range.begin) * CHANNELS; map < int64_t(range.end) * CHANNELS; map++)
      for (int row = 0; row < OH; row++)
        for (int column = 0; column < OW; column++)
          function((map * HEIGHT + row * SH) * WIDTH + column * SW, (map * OH + row) * OW + column);
  }

  static_assert(KH * KW <= 256, "a window's entries are numbered by bytes");
  Array<uint8_t> largest;  // entry of each window
};

}  // namespace kernels
