"""Configs of the norms, the rotation and the gate, see `kernels/tuning.py`.

They are bound by memory: some 4,096 numbers a program. Widths: a row, half a head, a row.
"""

from onevocab.kernels.tuning import ANY, Table

TABLE: Table = {
    (f"{operation}{direction}", widest, 0, 0): config
    for direction in ("", "_backward")
    for operation, widest, config in (
        ("rms_norm", 256, {"ROWS": 16, "num_warps": 4}),
        ("rms_norm", 1024, {"ROWS": 4, "num_warps": 4}),
        ("rms_norm", 2048, {"ROWS": 2, "num_warps": 8}),
        ("rms_norm", 8192, {"ROWS": 1, "num_warps": 8}),
        ("rms_norm", 32768, {"ROWS": 1, "num_warps": 16}),
        ("qk_norm_rope", 64, {"ROWS": 32, "num_warps": 4}),
        ("qk_norm_rope", 256, {"ROWS": 8, "num_warps": 4}),
        ("swiglu", ANY, {"BLOCK": 2048, "num_warps": 4}),
    )
}
