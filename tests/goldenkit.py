"""The registry of golden checks: what a case of one system and kind compares.

A check is a generator `fn(case, path)`: `case` is the JSON object, `path` its
file (arrays and data lie beside it). It yields `(what, got, want, tolerance)`
or `(what, got, want, tolerance, relative)`; numbers, None, text, arrays, lists
and dicts are compared whole. The largest error over its tolerance decides."""
import math

import numpy as np

KINDS = {}


def case(system, kind):
    "Register a check for the cases of `system` and `kind`."
    def add(fn):
        assert (system, kind) not in KINDS, f"two checks for {system}/{kind}"
        KINDS[system, kind] = fn
        return fn
    return add


def number(x):
    return isinstance(x, (int, float, np.number)) and not isinstance(x, (bool, np.bool_))


def array(x):
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    return isinstance(x, np.ndarray), x


def worst(got, want, tol, relative=0.0):
    """The largest |got - want| / (tol + relative * |want|); inf where the two
    differ in shape, in kind or in what cannot be subtracted."""
    (ga, got), (wa, want) = array(got), array(want)
    if ga or wa:
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            return math.inf
        if got.dtype.kind not in "biufc" or want.dtype.kind not in "biufc":
            return 0.0 if np.array_equal(got, want) else math.inf
        if not got.size:
            return 0.0
        got, want = got.astype(np.float64), want.astype(np.float64)
        with np.errstate(all="ignore"):
            return _ratio(np.abs(got - want), tol + relative * np.abs(want), got, want)
    if isinstance(want, dict):
        if not isinstance(got, dict) or set(map(str, got)) != set(map(str, want)):
            return math.inf
        got = {str(k): v for k, v in got.items()}
        return max((worst(got[str(k)], v, tol, relative) for k, v in want.items()), default=0.0)
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return math.inf
        return max((worst(g, w, tol, relative) for g, w in zip(got, want)), default=0.0)
    if number(got) and number(want):
        got, want = np.float64(got), np.float64(want)
        return _ratio(abs(got - want), tol + relative * abs(want), got, want)
    return 0.0 if type(got) is type(want) and got == want else math.inf


def _ratio(err, allowed, got, want):
    "Errors over what is allowed; equal is 0, even infinities and NaN."
    with np.errstate(all="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        r = np.where(same, 0.0, np.where(allowed > 0, err / allowed, math.inf))
    r = np.where(np.isnan(r), math.inf, r)
    return float(np.max(r))


def score(path, data):
    "(largest error over its tolerance, what it is) of one case."
    key = data.get("system"), data["kind"]
    if key not in KINDS:
        return math.inf, f"no check for system {key[0]!r}, kind {key[1]!r}"
    top, what, seen = -1.0, "", 0
    for name, got, want, tol, *rel in KINDS[key](data, path):
        r = worst(got, want, tol, *rel)
        seen += 1
        if r > top:
            top, what = r, name
    return (top, what) if seen else (math.inf, "the check compared nothing")
