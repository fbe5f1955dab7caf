/* A row in one pass over memory, with the same roundings as scaled additions of torch.

   out <- w[0] x + w[1] m + sum_k w[4 + k] term[k];   kept <- w[2] x + w[3] m, if there is a kept.
   Element by element all is read before anything is written: out may be x, kept one of the terms.
   A block is as large as the nearest cache holds several times over.
   Returns whether some entry of m is not finite; if `spare`, there out is x. Compiled by kernels.py, with REAL and its largest number MAX defined. */
#include <float.h>
#include <math.h>
#include <stdint.h>

#ifdef __FP_FAST_FMA
static float fused_float(float a, float b, float c) { return fmaf(a, b, c); }
static double fused_double(double a, double b, double c) { return fma(a, b, c); }
#define FMA(a, b, c) _Generic((c), float: fused_float, double: fused_double)(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#define IS_FINITE(v) ((v) <= MAX && (v) >= -MAX)
#define BLOCK 512

int row(int64_t begin, int64_t end, const REAL *x, const REAL *m, REAL *out, REAL *kept,
        int terms, const REAL *const *term, const REAL *w, int spare)
{
    int bad = 0;
    for (int64_t at = begin; at < end; at += BLOCK) {
        int n = end - at < BLOCK ? (int)(end - at) : BLOCK;
        int bad_here = 0;
        REAL next[BLOCK], keep[BLOCK];
        for (int i = 0; i < n; i++) {
            next[i] = FMA(w[1], m[at + i], w[0] * x[at + i]);
            keep[i] = FMA(w[3], m[at + i], w[2] * x[at + i]);
            bad_here |= !IS_FINITE(m[at + i]);
        }
        for (int k = 0; k < terms; k++)
            for (int i = 0; i < n; i++)
                next[i] = FMA(w[4 + k], term[k][at + i], next[i]);
        if (bad_here && spare)
            for (int i = 0; i < n; i++)
                next[i] = IS_FINITE(m[at + i]) ? next[i] : x[at + i];
        bad |= bad_here;
        for (int i = 0; i < n; i++)
            out[at + i] = next[i];
        if (kept)
            for (int i = 0; i < n; i++)
                kept[at + i] = keep[i];
    }
    return bad;
}
