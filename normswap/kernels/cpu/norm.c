/* One norm over the last axis, forward and backward.

   y = gain * (x - m) * r + b,    m = mean(x) (0 for an rmsnorm),    r = 1 / sqrt(mean((x - m)^2) + eps)

   With h = (x - m) r and t = gain dy:

   dx = r (t - mean(t) - h mean(t h))   (no mean(t) for an rmsnorm),    dgain = sum dy h,    dbias = sum dy

   Compiled once for each combination of (library.py):
     X, Y, W, B        dtype of x and dx, of y and dy, of the weight, of the bias; W and B may be NONE
     CENTRED, ONE_PLUS is it a layernorm; is the gain 1 + w
     ROUND_H, ROUND_GAIN, ROUND_PRODUCT, ROUND_SUM
                       to which dtype h, the gain, their product and the sum with the bias are rounded on the way

   Everything is computed in float32. Sums run over LANES columns side by side and are added up in one order, so that
   they do not depend on the width of the machine's vectors. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define NONE 0
#define FLOAT32 1
#define BFLOAT16 2
#define FLOAT16 3

#define LANES 64
#define ROWS 4 /* that one pass of the backward takes together: each column's sum is then read and written once */

#define INLINE static inline __attribute__((always_inline))

/* ---- dtypes ---- */

INLINE float as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE uint32_t as_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

INLINE float from_bf16(uint16_t h) { return as_float((uint32_t)h << 16); }

INLINE uint16_t to_bf16(float f) {
    uint32_t u = as_bits(f);
    uint32_t nearest_even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return f != f ? 0x7fc0 : nearest_even;
}

INLINE float from_f16(uint16_t h) {
    /* the exponent's bias is 112 less than a float's; infinities and NaN become 2^16 and more, and get a float's */
    uint32_t u = as_bits(as_float((uint32_t)(h & 0x7fff) << 13) * 0x1p112f);
    u |= u >= 0x47800000 ? 0x7f800000 : 0;
    return as_float(u | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t to_f16(float f) {
    /* adding a power of two that leaves ten bits of the mantissa rounds as the machine rounds, subnormals included */
    uint32_t u = as_bits(f), magnitude = u & 0x7fffffff;
    uint32_t exponent = magnitude & 0x7f800000;
    exponent = exponent < 0x38800000 ? 0x38800000 : exponent;
    float scaled = as_float(magnitude) * 0x1p112f * 0x1p-110f; /* 2^16 and more overflow */
    uint32_t sum = as_bits(scaled + as_float(exponent + 0x07800000));
    uint32_t half = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return half | ((u >> 16) & 0x8000);
}

INLINE float get(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return dtype == BFLOAT16 ? from_bf16(h) : from_f16(h);
}

INLINE void put(void *p, int64_t i, float value, int dtype) {
    if (dtype == FLOAT32)
        ((float *)p)[i] = value;
    else
        ((uint16_t *)p)[i] = dtype == BFLOAT16 ? to_bf16(value) : to_f16(value);
}

INLINE float rounded(float value, int dtype) {
    if (dtype == FLOAT32) return value;
    return dtype == BFLOAT16 ? from_bf16(to_bf16(value)) : from_f16(to_f16(value));
}

INLINE int64_t size(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* ---- one call, cut into chunks of rows that threads take in turn ---- */

typedef void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */

/* as library.py packs it: one pointer is passed in a third of the time that a dozen arguments take */
struct call {
    const void *x, *weight, *bias, *dy;
    void *y, *dx;
    float *scale, *mean; /* r and m of each row; the forward keeps none where they are NULL */
    float *dgain, *dbias; /* of each chunk, (chunks, width); of those that the variant has both, or NULL: not wanted */
    int64_t rows, width, chunks;
    parallel in_parallel;
    double eps;
};

struct work {
    const struct call *call;
    void (*run)(const struct call *, int64_t first, int64_t last, int64_t chunk);
    int64_t taken;
};

static void take_chunks(void *data) {
    struct work *w = data;
    const int64_t rows = w->call->rows, chunks = w->call->chunks;
    int64_t k;
    while ((k = __atomic_fetch_add(&w->taken, 1, __ATOMIC_RELAXED)) < chunks)
        w->run(w->call, k * rows / chunks, (k + 1) * rows / chunks, k);
}

static void run_chunks(const struct call *c, void (*run)(const struct call *, int64_t, int64_t, int64_t)) {
    struct work w = {.call = c, .run = run, .taken = 0};
    if (c->chunks > 1)
        c->in_parallel(take_chunks, &w, (unsigned)c->chunks, 0);
    else
        take_chunks(&w);
}

/* ---- the mathematics ---- */

INLINE float centred(const void *x, int64_t i, float mean) { return CENTRED ? get(x, i, X) - mean : get(x, i, X); }

/* the sum over a row; a function for each, so that the compiler has one loop to make of it */
#define SUM_OVER_ROW(name, parameters, expression)                      \
    static __attribute__((noinline)) float name parameters {            \
        float lanes[LANES] = {0}, total = 0;                            \
        int64_t start = 0;                                              \
        for (; start + LANES <= width; start += LANES)                  \
            for (int64_t k = 0; k < LANES; k++) {                       \
                const int64_t i = start + k;                            \
                lanes[k] += (expression);                               \
            }                                                           \
        for (int64_t i = start; i < width; i++) lanes[i - start] += (expression); \
        for (int64_t k = 0; k < LANES; k++) total += lanes[k];          \
        return total;                                                   \
    }

INLINE float gain(const void *weight, int64_t i) {
    if (W == NONE) return 1;
    float w = get(weight, i, W);
    return ONE_PLUS ? rounded(1 + w, ROUND_GAIN) : w;
}

SUM_OVER_ROW(sum, (const void *x, int64_t width), get(x, i, X))

SUM_OVER_ROW(sum_of_squares, (const void *x, float mean, int64_t width),
             centred(x, i, mean) * centred(x, i, mean))

SUM_OVER_ROW(sum_of_t, (const void *dy, const void *weight, int64_t width), get(dy, i, Y) * gain(weight, i))

SUM_OVER_ROW(sum_of_t_x, (const void *dy, const void *weight, const void *x, float mean, int64_t width),
             get(dy, i, Y) * gain(weight, i) * centred(x, i, mean))

static void forward_rows(const struct call *c, int64_t first, int64_t last, int64_t chunk) {
    const int64_t width = c->width;
    const void *restrict weight = c->weight, *restrict bias = c->bias;
    (void)chunk;
    for (int64_t row = first; row < last; row++) {
        const void *restrict x = (const char *)c->x + row * width * size(X);
        void *restrict y = (char *)c->y + row * width * size(Y);
        const float mean = CENTRED ? sum(x, width) / width : 0;
        const float scale = 1 / sqrtf(sum_of_squares(x, mean, width) / width + (float)c->eps);
        if (c->scale) c->scale[row] = scale;
        if (CENTRED && c->mean) c->mean[row] = mean;
        for (int64_t i = 0; i < width; i++) {
            float h = rounded(centred(x, i, mean) * scale, ROUND_H);
            if (W != NONE) h = rounded(h * gain(weight, i), ROUND_PRODUCT);
            if (B != NONE) h = rounded(h + get(bias, i, B), ROUND_SUM);
            put(y, i, h, Y);
        }
    }
}

/* count, sums: constants where this is inlined; without sums there is no gradient of gain and bias */
INLINE void backward_of(const struct call *c, int64_t row, const int count, const int sums, int64_t chunk) {
    const int64_t width = c->width;
    const void *restrict weight = c->weight;
    float *restrict dgain = c->dgain + chunk * width, *restrict dbias = c->dbias + chunk * width;
    const void *x[ROWS], *dy[ROWS];
    void *dx[ROWS];
    float scale[ROWS], mean[ROWS], along[ROWS], shift[ROWS];
    for (int j = 0; j < count; j++) {
        x[j] = (const char *)c->x + (row + j) * width * size(X);
        dy[j] = (const char *)c->dy + (row + j) * width * size(Y);
        dx[j] = (char *)c->dx + (row + j) * width * size(X);
        scale[j] = c->scale[row + j];
        mean[j] = CENTRED ? c->mean[row + j] : 0;
        shift[j] = CENTRED ? sum_of_t(dy[j], weight, width) / width : 0;
        along[j] = sum_of_t_x(dy[j], weight, x[j], mean[j], width) * scale[j] / width;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < width; i++) {
        const float g = gain(weight, i);
        float of_gain = 0, of_bias = 0;
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            const float d = get(dy[j], i, Y), h = centred(x[j], i, mean[j]) * scale[j];
            of_gain += d * h;
            of_bias += d;
            put(dx[j], i, scale[j] * (d * g - shift[j] - h * along[j]), X);
        }
        if (sums && W != NONE) dgain[i] += of_gain;
        if (sums && B != NONE) dbias[i] += of_bias;
    }
}

INLINE void backward_chunk(const struct call *c, int64_t first, int64_t last, const int sums, int64_t chunk) {
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS) backward_of(c, row, ROWS, sums, chunk);
    for (; row < last; row++) backward_of(c, row, 1, sums, chunk);
}

static void backward_rows(const struct call *c, int64_t first, int64_t last, int64_t chunk) {
    const size_t bytes = c->width * sizeof(float);
    if (c->dgain) memset(c->dgain + chunk * c->width, 0, bytes);
    if (c->dbias) memset(c->dbias + chunk * c->width, 0, bytes);
    if (c->dgain || c->dbias)
        backward_chunk(c, first, last, 1, chunk);
    else
        backward_chunk(c, first, last, 0, chunk);
}

void forward(const struct call *c) { run_chunks(c, forward_rows); }

void backward(const struct call *c) { run_chunks(c, backward_rows); }
