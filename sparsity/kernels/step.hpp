// Training steps of a network: batches, forward, loss, backward and update, many steps at one call.
#pragma once

#include <time.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <tuple>

#include "layers.hpp"

namespace kernels {

// What a call is given; the caller has the same fields in the same order.
struct Arguments {
  const void* images;  // [n, units]
  int64_t is_float;    // float32, else uint8
  const float* mean;   // of pixels in [0, 1], by channel; null: 0 and 1
  const float* deviation;
  int64_t channels;
  const int64_t* labels;
  const int64_t* order;  // images of the steps, one batch after the other
  const int64_t* sizes;  // of the batches
  const double* rates;   // learning rate of each step
  const double* decays;  // of the penalty
  int64_t steps, threads;
  const Tensor* tensors;
  Rule rule;
  double* sums;  // loss, penalty, and what is minimised, over images: added to
};

// Threads wait for each other: a moment awake, then asleep, so that others may have the core.
class Meeting {
 public:
  explicit Meeting(int threads) : threads(threads) {}

  void wait() {
    if (threads == 1) return;
    const int before = turn.load();
    if (arrived.fetch_add(1) + 1 == threads) {
      arrived.store(0);
      turn.store(before + 1);
      turn.notify_all();
      return;
    }
    for (int look = 0; look < 4000; look++) {
      if (turn.load() != before) return;
#if defined(__SSE__)
      _mm_pause();
#endif
    }
    while (turn.load() == before) turn.wait(before);
  }

 private:
  const int threads;
  std::atomic<int> arrived = 0, turn = 0;
};

// Seconds that this thread has computed.
inline double computed() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

// Remembers how many cores there were for the threads of a call. Where other work takes them, threads wait for each
// other longest: the next calls take as many as it leaves, which changes no bit, and then all are tried again.
class Cores {
 public:
  int of(int threads) { return calls > 0 ? calls--, std::min(threads, left) : threads; }

  // computed: by all threads together; passed: of the clock; both in seconds.
  void note(int threads, double computed, double passed) {
    if (threads == 1 || passed < LONG || computed > ENOUGH * threads * passed) return;
    left = std::max(1, int(computed / passed + 0.5)), calls = CALLS;
  }

 private:
  static constexpr double LONG = 0.005, ENOUGH = 0.75;
  static constexpr int CALLS = 20;
  int left = 1, calls = 0;
};

// The images of a batch, scaled, as [vector of images][unit][lane].
template <int UNITS>
class Batch {
 public:
  Batch(const Arguments& given, const int64_t* order, int images) : images(images), given(given), order(order) {}

  int groups() const { return (images + GROUP - 1) / GROUP; }

  // is_read: of each GROUP of units, whether any is; what is not stays as it was.
  void gather(float* x, int group, const std::vector<char>& is_read) const {
    x += int64_t(group) * GROUP * UNITS;
    if (given.is_float)
      gather<Vec, float, LANES>(x, group, is_read);
    else
      gather<Row, uint8_t, GROUP>(x, group, is_read);
  }

  // Asks for the images of a group, which lie anywhere, before they are needed.
  void fetch(int group) const {
    const int size = UNITS * (given.is_float ? sizeof(float) : 1);
    for (int place = group * GROUP; place < std::min((group + 1) * GROUP, images); place++) {
      const char* image = static_cast<const char*>(given.images) + order[place] * size;
      for (int byte = 0; byte < size; byte += 64) __builtin_prefetch(image + byte, 0, 2);
    }
  }

  int64_t label(int64_t image) const { return given.labels[order[image]]; }
  const int images;

 private:
  typedef uint8_t Row __attribute__((vector_size(GROUP)));

  // Tiles of N images by N units are turned. The last image stands for those that there are not.
  template <class V, class T, int N>
  void gather(float* x, int group, const std::vector<char>& is_read) const {
    for (int first = 0; first < GROUP; first += N) {
      const T* from[N];
      for (int image = 0; image < N; image++) {
        const int place = std::min(group * GROUP + first + image, images - 1);
        from[image] = static_cast<const T*>(given.images) + order[place] * UNITS;
      }
      for (int unit = 0; unit < UNITS; unit += N) {
        if (!is_read[unit / GROUP]) continue;
        const int count = std::min(N, UNITS - unit);
        V rows[N] = {};
        for (int image = 0; image < N; image++)
          if (count == N)
            std::memcpy(&rows[image], from[image] + unit, sizeof(V));
          else
            std::memcpy(&rows[image], from[image] + unit, count * sizeof(T));
        turn<V, N>(rows);
        for (int k = 0; k < count; k++)
          for (int lane = 0; lane < N; lane += LANES)
            store(x + (int64_t(first + lane) * UNITS + (unit + k) * LANES), scaled(pixels<V>(rows[k], lane), unit + k));
      }
    }
  }

  template <class V>
  static Vec pixels(V row, int lane) {
    if constexpr (std::is_same_v<V, Vec>)
      return row;
    else
      return of_bytes(reinterpret_cast<const uint8_t*>(&row) + lane) * (1.f / 255);
  }

  Vec scaled(Vec pixels, int unit) const {
    if (!given.mean) return pixels;
    const int64_t channel = unit / (UNITS / given.channels);
    return (pixels - given.mean[channel]) / given.deviation[channel];
  }

  const Arguments& given;
  const int64_t* order;
};

// The sum of the cross-entropies of images, and the gradient of their mean in the place of the outputs, for one vector.
template <int CLASSES, class Images>
double cross_entropy(float* outputs, const Images& batch, int vector) {
  Vec largest = load(outputs), total{};
  for (int c = 1; c < CLASSES; c++) largest = load(outputs + c * LANES) > largest ? load(outputs + c * LANES) : largest;
  double loss = 0;
  const int count = std::min(LANES, batch.images - vector * LANES);
  for (int lane = 0; lane < count; lane++)
    loss += largest[lane] - outputs[batch.label(vector * LANES + lane) * LANES + lane];
  for (int c = 0; c < CLASSES; c++) {
    const Vec each = exp(load(outputs + c * LANES) - largest);
    total += each, store(outputs + c * LANES, each);
  }
  Vec share{};
  for (int lane = 0; lane < count; lane++) {
    loss += std::log(total[lane]);
    share[lane] = 1.f / batch.images;
  }
  for (int c = 0; c < CLASSES; c++) store(outputs + c * LANES, load(outputs + c * LANES) / total * share);
  for (int lane = 0; lane < LANES; lane++)
    if (lane < count)
      outputs[batch.label(vector * LANES + lane) * LANES + lane] -= share[lane];
    else
      for (int c = 0; c < CLASSES; c++) outputs[c * LANES + lane] = 0;  // no image, and no NaN of none
  return loss;
}

// The images of a vector that belong to the class whose output is largest: the first of equals, NaN before all.
template <int CLASSES, class Images>
int count_correct(const float* outputs, const Images& batch, int vector) {
  Vec largest = load(outputs);
  Ints found{};
  for (int c = 1; c < CLASSES; c++) {
    const Vec next = load(outputs + c * LANES);
    const Ints is_larger = (next > largest) | ((next != next) & (largest == largest));
    largest = is_larger ? next : largest;
    found = is_larger ? Ints{} + c : found;
  }
  int correct = 0;
  for (int lane = 0; lane < std::min(LANES, batch.images - vector * LANES); lane++)
    correct += found[lane] == batch.label(vector * LANES + lane);
  return correct;
}

// Calls a function of each thread's share, this thread's among them.
template <class Function>
void in_threads(int threads, Function function) {
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; thread++) others.emplace_back([=] { function(Share{thread, threads}); });
  function(Share{0, threads});
  for (auto& each : others) each.join();
}

constexpr int64_t WORTH_A_THREAD =
    500000;                       // multiplications of a batch, forward: for less, threads wait for each other
constexpr int PIECE = 4 * GROUP;  // images that a thread measures at once

template <class... Layers>
class Network {
  using All = std::tuple<Layers...>;
  static constexpr int COUNT = sizeof...(Layers);
  template <int I>
  using At = std::tuple_element_t<I, All>;
  static constexpr int UNITS = At<0>::INPUTS, CLASSES = At<COUNT - 1>::OUTPUTS;

 public:
  void run(const Arguments& given) {
    begin(given, up_to(*std::max_element(given.sizes, given.sizes + given.steps), GROUP) / LANES);
    const int threads = cores.of(worth(given, given.sizes[0]));
    Meeting meeting(threads);
    std::vector<double> seconds(threads);
    const auto start = std::chrono::steady_clock::now();
    in_threads(threads, [&](Share share) {
      const double before = computed();
      work(given, share, meeting);
      seconds[share.thread] = computed() - before;
    });
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    cores.note(threads, std::accumulate(seconds.begin(), seconds.end(), 0.0), passed.count());
    over_parameters([&](Parameter& parameter, int) { parameter.end(given.rule); });
  }

  // How many images of the one batch given are put into their own classes; the tensors stay as they are.
  int64_t correct(const Arguments& given) {
    begin(given, given.threads * PIECE / LANES);
    const int images = given.sizes[0], pieces = (images + PIECE - 1) / PIECE;
    std::atomic<int64_t> found = 0;
    in_threads(worth(given, images), [&](Share share) {
      const Flushed flushed;
      for (int piece = share.begin(pieces); piece < share.end(pieces); piece++) {
        const int first = piece * PIECE;
        found += correct(Batch<UNITS>(given, given.order + first, std::min(PIECE, images - first)), share.thread);
      }
    });
    return found;
  }

 private:
  void begin(const Arguments& given, int vectors) {
    losses.assign(vectors, 0);
    over_parameters(
        [&](Parameter& parameter, int index) { parameter.begin(given.tensors[index], given.rule, given.threads); });
    over_layers([&]<int I>() {
      std::get<I>(layers).resize(vectors), std::get<I>(layers).begin(given.threads);
      for (auto* each : {&values, &slopes})
        if (!At<I>::IN_PLACE) (*each)[I + 1].resize(int64_t(vectors) * LANES * At<I>::OUTPUTS);
    });
    values[0].resize(int64_t(vectors) * LANES * UNITS);
    is_read.assign((UNITS + GROUP - 1) / GROUP, false);
    for (int unit = 0; unit < UNITS; unit++) is_read[unit / GROUP] |= std::get<0>(layers).reads(unit);
  }

  // The number of threads that so many images at a time are worth.
  int worth(const Arguments& given, int64_t images) {
    int64_t products = 0;
    over_layers([&]<int I>() { products += std::get<I>(layers).products(); });
    return std::clamp<int64_t>(products * images / WORTH_A_THREAD, 1, given.threads);
  }

  // Of the images of a piece, in a thread's own part of the memory.
  int correct(const Batch<UNITS>& batch, int thread) {
    const int before = thread * PIECE, first = before / LANES;
    const Range range{first, first + batch.groups() * GROUP / LANES};
    for (int group = 0; group < batch.groups(); group++)
      batch.gather(values[0].get() + int64_t(before) * UNITS, group, is_read);
    for (int v = range.begin; v < range.end; v++) forward<0, CUT, false>({v, v + 1});
    forward<CUT, COUNT, false>(range);
    int found = 0;
    for (int v = range.begin; v < range.end; v++)
      found += count_correct<CLASSES>(output<COUNT - 1>() + int64_t(v) * CLASSES * LANES, batch, v - first);
    return found;
  }

  void work(const Arguments& given, Share share, Meeting& meeting) {
    const Flushed flushed;
    Rule rule = given.rule;
    over_parameters([&](Parameter& parameter, int) { parameter.measure(share); });
    const int64_t* order = given.order;
    for (int64_t step = 0; step < given.steps; order += given.sizes[step], step++, rule.number++) {
      rule.rate = given.rates[step], rule.decay = given.decays[step];
      const Batch<UNITS> batch(given, order, given.sizes[step]);
      differentiate(batch, share);
      if (step + 1 < given.steps) {
        const Batch<UNITS> next(given, order + given.sizes[step], given.sizes[step + 1]);
        for (int group = share.begin(next.groups()); group < share.end(next.groups()); group++) next.fetch(group);
      }
      meeting.wait();
      over_layers([&]<int I>() {
        const int vectors = batch.groups() * GROUP / LANES;
        std::get<I>(layers).update(input<I>(), slope<I>(), batch.images, vectors, step, share, rule);
      });
      if (share.thread == 0) note(given, batch, rule.decay);
      meeting.wait();
    }
  }

  // The thread's own images through the network and back.
  void differentiate(const Batch<UNITS>& batch, Share share) {
    const int first = share.begin(batch.groups()), last = share.end(batch.groups());
    const Range range{first * GROUP / LANES, last * GROUP / LANES};
    for (int group = first; group < last; group++) batch.gather(values[0].get(), group, is_read);
    for (int v = range.begin; v < range.end; v++) forward<0, CUT, true>({v, v + 1});
    forward<CUT, COUNT, true>(range);
    const int64_t size = int64_t(CLASSES) * LANES;
    for (int v = range.begin; v < range.end; v++) {
      float* outputs = slope<COUNT - 1>() + v * size;
      std::memcpy(outputs, output<COUNT - 1>() + v * size, size * sizeof(float));
      losses[v] = cross_entropy<CLASSES>(outputs, batch, v);
    }
    backward<COUNT - 1, CUT>(range, share.thread);
    for (int v = range.begin; v < range.end; v++) backward<CUT - 1, 0>({v, v + 1}, share.thread);
  }

  // KEEPS: what the way back reads.
  template <int I, int END, bool KEEPS>
  void forward(Range range) {
    if constexpr (I < END) {
      std::get<I>(layers).forward(input<I>(), output<I>(), range);
      if (KEEPS) std::get<I>(layers).keep(input<I>(), range);
      forward<I + 1, END, KEEPS>(range);
    }
  }

  template <int I, int END>
  void backward(Range range, int thread) {
    if constexpr (I >= END && I > FIRST) {
      std::get<I>(layers).backward(input<I>(), output<I>(), slope<I>(), slope<I - 1>(), range, thread);
      backward<I - 1, END>(range, thread);
    }
  }

  void note(const Arguments& given, const Batch<UNITS>& batch, double decay) {
    double loss = 0, penalty = 0;
    for (int v = 0; v < batch.groups() * GROUP / LANES; v++) loss += losses[v];
    over_layers([&]<int I>() { penalty += std::get<I>(layers).value(); });
    given.sums[0] += loss, given.sums[1] += batch.images * penalty,
        given.sums[2] += loss + batch.images * decay * penalty;
  }

  template <class Function>
  void over_layers(Function function) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (function.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, COUNT>());
  }

  template <class Function>
  void over_parameters(Function function) {
    int index = 0;
    over_layers([&]<int I>() {
      for (int own = 0; own < At<I>::PARAMETERS; own++) function(*std::get<I>(layers).parameter(own), index++);
    });
  }

  // Where a layer's outputs lie: with those of the one before, where it works in place.
  static constexpr int place(int layer) {
    constexpr bool in_place[] = {Layers::IN_PLACE...};
    while (layer > 0 && in_place[layer - 1]) layer--;
    return layer;
  }

  // The first layer with parameters: nothing before it has a gradient.
  static constexpr int first() {
    constexpr int parameters[] = {Layers::PARAMETERS...};
    int layer = 0;
    while (layer < COUNT - 1 && !parameters[layer]) layer++;
    return layer;
  }
  static constexpr int FIRST = first();

  // The layers before it take one vector of images after the other, so that maps stay in the caches; from it on, each
  // weight is multiplied by several.
  static constexpr int cut() {
    constexpr bool is_wide[] = {Layers::IS_WIDE...};
    int layer = 0;
    while (layer < COUNT && !is_wide[layer]) layer++;
    return layer;
  }
  static constexpr int CUT = cut();

  template <int I>
  float* input() {
    return values[place(I)].get();
  }
  template <int I>
  float* output() {
    return values[place(I + 1)].get();
  }
  template <int I>
  float* slope() {
    return slopes[place(I + 1)].get();
  }  // of the outputs

  All layers;
  Cores cores;
  Array<float> values[COUNT + 1], slopes[COUNT + 1];
  std::vector<double> losses;  // of vectors of images
  std::vector<char> is_read;   // of each GROUP of units of images, whether anything depends on one
};

}  // namespace kernels
