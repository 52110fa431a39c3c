"""The innermost loop of matrix products with few rows: a tile of dot products in registers.

Only `engine.kernels.decode_layer` calls it, from compiled code. Written as LLVM instructions,
because a compiler that vectorises loops by itself spills the sums to memory and adds them up at
the end of each row in many steps: SmolLM2's matrices with 8 rows took 31 ms on 2 cores instead
of 23. Most of that is the prefetch of the next tile; without it, computing and waiting for memory
take turns.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

UNIT = 16
"""Lengths of dot products must be a multiple of this: floats in the widest vector."""
WEIGHT_ROWS = 4
"""Rows of the matrix in a tile; matrices must have a multiple of it."""


def vector_lanes() -> int:
    """Floats in a vector of this processor."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


def make_dot_tile(num_rows: int, lanes: int) -> Any:
    """Compiled-code function for tiles of `num_rows` rows of x.

    Args:
        num_rows: of x in a tile; 4 * num_rows sums should fit the vector registers.
        lanes: floats per vector.

    Returns:
        tile(weight [N, K], x [M, K], out [M, N], n, m), all C-contiguous float32: writes
        out[m : m + num_rows, n : n + 4] = x[m : ...] @ weight[n : n + 4].T
    """
    vector = ir.VectorType(ir.FloatType(), lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, x, out = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:3], args[:3], strict=True)
        )
        first_weight, first_x = args[3:]
        size = cgutils.unpack_tuple(builder, weight.shape)[1]
        width = cgutils.unpack_tuple(builder, out.shape)[1]
        index = size.type

        def row(array: Any, first: Any, offset: int, length: Any) -> Any:
            number = builder.add(first, ir.Constant(index, offset))
            return builder.gep(array.data, [builder.mul(number, length)])

        weights = [row(weight, first_weight, i, size) for i in range(WEIGHT_ROWS)]
        rows = [row(x, first_x, j, size) for j in range(num_rows)]
        sums = [
            [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in rows]
            for _ in weights
        ]

        def load(pointer: Any, position: Any) -> Any:
            address = builder.gep(pointer, [position])
            return builder.load(builder.bitcast(address, vector.as_pointer()), align=4)

        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f32"
        )
        byte_pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte_pointer, flag, flag, flag]),
            "llvm.prefetch.p0",
        )
        how = [ir.Constant(flag, value) for value in (0, 3, 1)]  # to read, keep close, data
        next_rows = builder.mul(size, ir.Constant(index, WEIGHT_ROWS))
        step = ir.Constant(index, lanes)
        with cgutils.for_range_slice(builder, ir.Constant(index, 0), size, step) as (k, _):
            of_weights = [load(pointer, k) for pointer in weights]
            for pointer in weights:
                ahead = builder.gep(pointer, [builder.add(k, next_rows)])
                builder.call(prefetch, [builder.bitcast(ahead, byte_pointer), *how])
            for j, pointer in enumerate(rows):
                of_x = load(pointer, k)
                for i, of_weight in enumerate(of_weights):
                    total = builder.call(fma, [of_weight, of_x, builder.load(sums[i][j])])
                    builder.store(total, sums[i][j])
        reduce_type = ir.FunctionType(ir.FloatType(), [ir.FloatType(), vector])
        reduce_name = f"llvm.vector.reduce.fadd.v{lanes}f32"
        reduce = cgutils.get_or_insert_function(builder.module, reduce_type, reduce_name)
        zero = ir.Constant(ir.FloatType(), 0.0)
        for j in range(num_rows):
            line = builder.gep(row(out, first_x, j, width), [first_weight])
            for i in range(WEIGHT_ROWS):
                total = builder.call(
                    reduce, [zero, builder.load(sums[i][j])], fastmath=("reassoc", "nsz")
                )
                builder.store(total, builder.gep(line, [ir.Constant(index, i)]))
        return context.get_dummy_value()

    def tile(typingctx: Any, weight: Any, x: Any, out: Any, n: Any, m: Any) -> Any:
        return types.void(weight, x, out, types.intp, types.intp), codegen

    return intrinsic(tile)
