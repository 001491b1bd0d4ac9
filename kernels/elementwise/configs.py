"""Configs of the norms, the rotation and the gate, see `kernels/tuning.py`.

They are bound by memory: some 4,096 numbers a program. Widths: a row, half a head, a row. STAGES of a backward pass:
with 2 the next tile of rows is on its way while one is worked on; the widest rows leave no registers for it.
"""

from onevocab.kernels.tuning import ANY, Table

TABLE: Table = {
    (f"{operation}{direction}", widest, 0, 0): {**config, **more}
    for operation, widest, config, backward in (
        ("rms_norm", 256, {"ROWS": 16, "num_warps": 4}, {"STAGES": 2}),
        ("rms_norm", 1024, {"ROWS": 4, "num_warps": 4}, {"STAGES": 2}),
        ("rms_norm", 2048, {"ROWS": 2, "num_warps": 8}, {"STAGES": 2}),
        ("rms_norm", 8192, {"ROWS": 1, "num_warps": 8}, {"STAGES": 2}),
        ("rms_norm", 32768, {"ROWS": 1, "num_warps": 16}, {"STAGES": 1}),
        ("qk_norm_rope", 64, {"ROWS": 16, "num_warps": 4}, {"STAGES": 2}),
        ("qk_norm_rope", 256, {"ROWS": 8, "num_warps": 4}, {"STAGES": 2}),
        ("swiglu", ANY, {"BLOCK": 2048, "num_warps": 4}, {}),
    )
    for direction, more in (("", {}), ("_backward", backward))
}
