"""Counting in compiled programs: against texts counted by hand, against unrolled programs, and against formulas."""

import json
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import recipes
from navit_jax import navit
from navit_jax.plan import hlo, step, traffic
from navit_jax.plan.program import read
from navit_jax.plan.trips import trip_count

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def text(entry, *computations, devices=8):
    head = f"HloModule test, is_scheduled=true, num_partitions={devices}\n"
    lines = "\n".join(f"  {line}" for line in entry)
    return f"{head}{''.join(computations)}\nENTRY %main (p: f32[4,8]) -> f32[4,8] {{\n{lines}\n}}\n"


def computation(name, *lines):
    return f"\n%{name} (q: f32[4,8]) -> f32[4,8] {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


def loop(name, start, bound, body, *, step=1, direction="LT", result="(s32[], f32[4,8])"):
    """A loop without the compiler's note: its condition, its body, the lines that start it."""
    condition = (
        f"%q = {result} parameter(0)",
        "%i = s32[] get-tuple-element(%q), index=0",
        f"%bound = s32[]{{:T(128)}} constant({bound})",
        f"ROOT %go = pred[] compare(%i, %bound), direction={direction}",
    )
    lines = (
        f"%q = {result} parameter(0)",
        "%i = s32[] get-tuple-element(%q), index=0",
        "%x = f32[4,8] get-tuple-element(%q), index=1",
        f"%step = s32[] constant({step})",
        "%next = s32[] add(%i, %step)",
        *body,
        f"ROOT %out = {result} tuple(%next, %x)",
    )
    begin = (
        f"%{name}.start = s32[] constant({start})",
        f"%{name}.first = s32[] copy(%{name}.start)",
        f"%{name}.init = {result} tuple(%{name}.first, %p)",
        f"%{name} = {result} while(%{name}.init), condition=%{name}.cond, body=%{name}.body",
    )
    return begin, computation(f"{name}.cond", *condition), computation(f"{name}.body", *lines)


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": (0, 1, 2, 3),
    "replica_groups={}": (0, 1, 2, 3, 4, 5, 6, 7),
    "replica_groups=[2,4]<=[8]": (0, 1, 2, 3),
    "replica_groups=[4,2]<=[2,4]T(1,0)": (0, 4),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": (0, 1, 2, 3),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": (0, 4),
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": (0, 1, 2, 3),
    "replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}": (0, 2),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_every_way_of_writing_groups(groups):
    line = f"ROOT %r = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add"
    (found,) = hlo.collectives(text(["%p = f32[4,8]{1,0} parameter(0)", line], ADD))
    assert found.members == GROUPS[groups]
    assert (found.kind, found.count, found.bytes, found.shapes) == ("all-reduce", 1, 128, ("f32[4,8]",))


@pytest.mark.parametrize(
    "line, kind, held, sent",
    [
        ("all-reduce(%p), to_apply=%add", "all-reduce", 128, 192),  # there and back: 2 * 3/4
        ("all-gather(%p), dimensions={0}", "all-gather", 512, 384),
        ("reduce-scatter(%p), dimensions={0}, to_apply=%add", "reduce-scatter", 128, 96),
        ("all-to-all(%p), dimensions={0}", "all-to-all", 128, 96),
    ],
)
def test_bytes_are_of_the_whole_array_and_sent_as_by_a_ring(line, kind, held, sent):
    line = f"ROOT %r = f32[4,8]{{1,0}} {line}, replica_groups=[2,4]<=[8]"
    (found,) = hlo.collectives(text(["%p = f32[4,8]{1,0} parameter(0)", line], ADD))
    assert (found.kind, found.bytes, found.sent, found.overlapped) == (kind, held, sent, False)


def test_a_collective_among_one_chip_is_none():
    line = "ROOT %r = f32[4,8]{1,0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add"
    assert hlo.collectives(text(["%p = f32[4,8]{1,0} parameter(0)", line], ADD, devices=2)) == []


def test_a_start_and_its_end_count_once_and_overlap():
    """The forms of GPUs: a start of its own, and a wrapped computation."""
    entry = [
        "%p = f32[4,8]{1,0} parameter(0)",
        "%s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}",
        "%d = f32[8,8]{1,0} all-gather-done(%s)",
        "%r.s = f32[4,8]{1,0} all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%add",
        "%r.d = f32[4,8]{1,0} all-reduce-done(%r.s)",
        "%c.s = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p), "
        "source_target_pairs={{0,1},{1,0}}",
        "%c.d = f32[4,8]{1,0} collective-permute-done(%c.s)",
        "%a.s = ((f32[4,8]{1,0}), f32[2,8]{1,0}, u32[]) async-start(%p), calls=%wrapped",
        "%a.d = f32[2,8]{1,0} async-done(%a.s)",
        "ROOT %out = f32[4,8]{1,0} copy(%r.d)",
    ]
    scatter = "ROOT %rs = f32[2,8]{1,0} reduce-scatter(%q), replica_groups={{0,1}}, dimensions={0}, to_apply=%add"
    inside = computation("wrapped", "%q = f32[4,8]{1,0} parameter(0)", scatter)
    found = hlo.collectives(text(entry, ADD, inside, devices=2))
    assert [(c.kind, c.count, c.bytes, c.overlapped) for c in found] == [
        ("all-gather", 1, 256, True),
        ("all-reduce", 1, 128, True),
        ("collective-permute", 1, 128, True),
        ("reduce-scatter", 1, 128, True),
    ]
    assert hlo.by_kind(found)["collective-permute"] == (1, 128, 128)


def test_forms_of_the_tpu():
    """One overlapped collective in three parts, and an all-reduce fused with the slice that each chip keeps."""
    gather = "all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes="
    gather += '{chain_id="0"}'
    part = "%q = f32[4,8]{1,0:T(8,128)} parameter(0)"
    begin = computation("begin", part, f"%g = f32[16,8]{{1,0:T(8,128)}} {gather}", 'ROOT %c = (f32[4,8]{1,0}, '
                        'f32[16,8]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"')  # fmt: skip
    middle = computation("middle", part, f"ROOT %g = f32[16,8]{{1,0:T(8,128)}} {gather}")
    end = computation("end", part, f"%g = f32[16,8]{{1,0:T(8,128)}} {gather}", "ROOT %c = f32[16,8]{1,0} "
                      'custom-call(%q, %g), custom_call_target="AsyncCollectiveDone"')  # fmt: skip
    whole = "%r = f32[4,8]{1,0} all-reduce(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add"
    piece = "ROOT %s = f32[1,8]{1,0} dynamic-slice(%r, %q, %q), dynamic_slice_sizes={1,8}"
    scatter = computation("all-reduce-scatter.1", part, whole, piece)
    entry = [
        "%p = f32[4,8]{1,0:T(8,128)} parameter(0)",
        "%f0 = (f32[4,8]{1,0}, f32[16,8]{1,0}) fusion(%p), kind=kCustom, calls=%begin",
        "%f1 = f32[16,8]{1,0} fusion(%p), kind=kCustom, calls=%middle",
        "%f2 = f32[16,8]{1,0} fusion(%p), kind=kCustom, calls=%end",
        'ROOT %f3 = f32[1,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="mine"}',
    ]
    found = hlo.collectives(text(entry, ADD, begin, middle, end, scatter))
    assert [(c.kind, c.bytes, c.group, c.overlapped, c.source) for c in found] == [
        ("all-gather", 512, 4, True, ""),
        ("reduce-scatter", 128, 4, False, "mine"),
    ]


REDUCE = "%y = f32[4,8] all-reduce(%x), replica_groups={}, to_apply=%add"


@pytest.mark.parametrize(
    "start, bound, step, direction, trips",
    [(0, 12, 1, "LT", 12), (0, 12, 5, "LT", 3), (3, 12, 1, "LE", 10), (12, 0, -2, "GT", 6), (5, 5, 1, "LT", 0)],
)
def test_a_loop_without_a_note_is_followed(start, bound, step, direction, trips):
    begin, condition, body = loop("w", start, bound, [REDUCE], step=step, direction=direction)
    entry = ["%p = f32[4,8] parameter(0)", *begin, "ROOT %out = f32[4,8] get-tuple-element(%w), index=1"]
    program = text(entry, ADD, condition, body)
    assert [c.count for c in hlo.collectives(program)] == ([trips] if trips else [])
    assert hlo.endless(program) == []


def test_loops_within_loops_multiply():
    begin, condition, body = loop("inner", 0, 5, [REDUCE])
    inner = [line.replace("%p)", "%x)") for line in begin]
    outer, outer_condition, outer_body = loop("outer", 0, 3, [REDUCE, *inner])
    entry = ["%p = f32[4,8] parameter(0)", *outer, "ROOT %out = f32[4,8] get-tuple-element(%outer), index=1"]
    found = hlo.collectives(text(entry, ADD, condition, body, outer_condition, outer_body))
    assert [c.count for c in found] == [3, 15]


def test_a_loop_that_data_decides_counts_once_and_is_named():
    begin, condition, body = loop("w", 0, 5, [REDUCE])
    body = body.replace("%step = s32[] constant(1)", "%step = s32[] convert(%x)")
    entry = ["%p = f32[4,8] parameter(0)", *begin, "ROOT %out = f32[4,8] get-tuple-element(%w), index=1"]
    program = text(entry, ADD, condition, body)
    assert [c.count for c in hlo.collectives(program)] == [1]
    assert hlo.endless(program) == ["w"]


def test_of_a_conditional_the_largest_branch_counts():
    one = computation("one", "%q = f32[4,8] parameter(0)", "ROOT %r = f32[4,8] all-reduce(%q), replica_groups={}")
    two = computation("two", "%q = f32[4,8] parameter(0)", "%r = f32[4,8] all-reduce(%q), replica_groups={}",
                      "ROOT %s = f32[4,8] all-reduce(%r), replica_groups={}")  # fmt: skip
    entry = ["%p = f32[4,8] parameter(0)", "%k = s32[] constant(0)"]
    entry += ["ROOT %c = f32[4,8] conditional(%k, %p, %p, %p), branch_computations={%one, %two, %one}"]
    assert len(hlo.collectives(text(entry, one, two))) == 2


def test_a_custom_call_counts_by_its_formula_or_is_named():
    call = 'ROOT %c = f32[4,8] custom-call(%p), custom_call_target="mine"'
    program = text(["%p = f32[4,8] parameter(0)", call])
    assert (hlo.flops(program), hlo.unknown_calls(program)) == (0, {"mine"})
    formulas = {"mine": lambda call, operands: 3.0 * np.prod(operands[0].shapes[0].dims)}
    assert (hlo.flops(program, formulas), hlo.unknown_calls(program, formulas)) == (96, set())
    gemm = '(f32[4,4]{1,0}, s8[64]{0}) custom-call(%p, %p), custom_call_target="__cublas$gemm", backend_config='
    gemm += '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    assert hlo.flops(text(["%p = f32[4,8] parameter(0)", f"ROOT %c = {gemm}"])) == 2 * 4 * 4 * 8


def test_the_cost_models_cycles_are_multiplied_too():
    noted = ', backend_config={"window_config":{"estimated_cycles":"70"}}'
    begin, condition, body = loop("w", 0, 5, ["%y = f32[4,8] copy(%x)" + noted])
    entry = ["%p = f32[4,8] parameter(0)", "%z = f32[4,8] copy(%p)" + noted, *begin]
    entry += ["ROOT %out = f32[4,8] get-tuple-element(%w), index=1"]
    assert hlo.cycles(text(entry, condition, body)) == 6 * 70


def dots(shape, contracted):
    return 2 * np.prod(shape) * contracted


def compiled(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*args).compile().as_text()


def test_products_in_nested_scans():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)[0], None

    found = compiled(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (16, 32), (3, 5, 32, 32))
    assert hlo.flops(found) == 15 * dots((16, 32), 32)
    without = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", found)
    assert without != found  # the compiler's notes, where there are any, agree with following the counter
    assert hlo.flops(without) == hlo.flops(found)


@pytest.mark.parametrize("stride, pad, dilation", [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
def test_convolutions_count_what_meets_the_input(stride, pad, dilation):
    """Against the count of ones that reach each output, summed: a convolution of ones is that count."""
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(stride,), padding=[(pad, pad)])
    convolve = partial(convolve, rhs_dilation=(dilation,), dimension_numbers=("NHC", "HIO", "NHC"))
    x, w = np.ones((3, 20, 4), np.float32), np.ones((5, 4, 6), np.float32)
    expected = 2 * float(convolve(x, w).sum())
    line = f"ROOT %c = f32[3,{convolve(x, w).shape[1]},6] convolution(%x, %w), "
    line += f"window={{size=5 stride={stride} pad={pad}_{pad} rhs_dilate={dilation}}}, dim_labels=b0f_0io->b0f"
    entry = ["%p = f32[4,8] parameter(0)", "%x = f32[3,20,4] constant({...})", "%w = f32[5,4,6] constant({...})", line]
    assert hlo.flops(text(entry)) == expected


def test_convolutions_in_groups():
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(1,), padding="VALID", feature_group_count=4)
    x, w = np.ones((3, 20, 8), np.float32), np.ones((5, 2, 12), np.float32)
    expected = 2 * float(convolve(x, w, dimension_numbers=("NHC", "HIO", "NHC")).sum())
    line = "ROOT %c = f32[3,16,12] convolution(%x, %w), window={size=5}, dim_labels=b0f_0io->b0f, feature_group_count=4"
    entry = ["%p = f32[4,8] parameter(0)", "%x = f32[3,20,8] constant({...})", "%w = f32[5,2,12] constant({...})", line]
    assert hlo.flops(text(entry)) == expected


def test_batched_products_as_a_tpu_writes_them():
    """[2, 3] batches of 256 x 64 by 64 x 256 as one dilated convolution."""
    line = "ROOT %c = f32[2,3,256,256] convolution(%x, %w), window={size=2x3 stride=1x2 pad=0_0x0_0 lhs_dilate=2x3}, "
    entry = ["%p = f32[4,8] parameter(0)", "%x = bf16[2,3,256,64] constant({...})"]
    entry += ["%w = bf16[2,3,256,64] constant({...})", line + "dim_labels=01bf_01oi->01bf"]
    assert hlo.flops(text(entry)) == 6 * dots((256, 256), 64)


@pytest.mark.parametrize(
    "line, moved",
    [
        ("%x = f32[4,8]{1,0} copy(%p)", 256),
        ("%x = f32[4,8]{1,0:T(8,128)S(1)} copy(%p)", 128),  # S(1): on the chip
        ("%x = (f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]) copy-start(%p)", 128),
        ("%x = ((f32[4,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]) slice-start(%p), slice={[0:1], [0:8]}", 32),
        ("%x = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}", 64),
        ("%x = f32[4,8]{1,0} dynamic-update-slice(%p, %u, %i, %i)", 64),
        ("%x = f32[8,4]{1,0} bitcast(%p)", 0),
        ("%x = f32[4,8]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=%in_place", 64),
        ("%x = f32[1,8]{1,0} fusion(%p, %i), kind=kLoop, calls=%sliced", 64),
    ],
)
def test_traffic_of_an_instruction(line, moved):
    """%p lies in main memory, [4, 8]; %u, [1, 8], too."""
    sliced = computation("sliced", "%q = f32[4,8] parameter(0)", "%j = s32[] parameter(1)",
                         "%s = f32[1,8] dynamic-slice(%q, %j, %j), dynamic_slice_sizes={1,8}",
                         "ROOT %n = f32[1,8] negate(%s)")  # fmt: skip
    in_place = computation("in_place", "%q = f32[4,8] parameter(0)", "%v = f32[1,8] parameter(1)",
                           "%j = s32[] parameter(2)", "%n = f32[1,8] negate(%v)",
                           "ROOT %s = f32[4,8] dynamic-update-slice(%q, %n, %j, %j)")  # fmt: skip
    entry = ["%p = f32[4,8]{1,0} parameter(0)", "%u = f32[1,8]{1,0} parameter(1)", "%i = s32[]{:S(2)} parameter(2)"]
    assert traffic.bytes_moved(text([*entry, line], sliced, in_place)) == moved


def test_traffic_of_a_scan_reads_each_layer_once():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def total(depth):
        return traffic.bytes_moved(compiled(lambda x, w: jax.lax.scan(layer, x, w)[0], (64, 256), (depth, 256, 256)))

    weights, rows = 256 * 256 * 4, 64 * 256 * 4
    a_layer = (total(24) - total(8)) / 16
    assert weights + 2 * rows <= a_layer <= 2.5 * weights + 8 * rows  # not the 8 or 24 layers' weights


def small(**fields):
    config = recipes.navit("t", "Ti/16", "", demo_steps=1, demo_lr=1e-3)
    config.model.update(width=128, depth=3, heads=4, mlp_dim=512, **fields)
    return config


def unrolled(f, init, xs, length=None, **_):
    """`jax.lax.scan` as a Python loop."""
    outs = []
    for i in range(length or jax.tree.leaves(xs)[0].shape[0]):
        init, out = f(init, jax.tree.map(lambda x: x[i], xs))  # noqa: B023
        outs.append(out)
    return init, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def encoder_gradient(config):
    """Compiled without the pass that merges equal products of the two directions, which only unrolled layers let it."""
    model, graph, shapes = navit.for_classes(config, 10)
    images = step.batch_shapes(config, step.rows_of(config)).images

    def total(params, images):
        return navit.merge(graph, params).tokens(images).sum()

    return jax.jit(jax.grad(total)).lower(shapes, images).compile({"xla_disable_hlo_passes": "cse"})


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_is_unrolled(monkeypatch, remat):
    scanned = encoder_gradient(small(remat=remat))
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    looped = encoder_gradient(small(remat=remat))
    assert " while(" in scanned.as_text() and " while(" not in looped.as_text()
    assert hlo.flops(scanned.as_text()) == pytest.approx(hlo.flops(looped.as_text()), rel=0.01)
    assert scanned.cost_analysis()["flops"] < 0.6 * looped.cost_analysis()["flops"]  # why this module exists


ON_EIGHT = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from navit_jax.plan import hlo, topology
topology.prepare(topology.parse("cpu:8"))
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
whole, rows, split = (NamedSharding(mesh, P(*axes)) for axes in ((), ("d",), (None, "d")))
gather = lambda w: jax.lax.with_sharding_constraint(w, whole)
layer = lambda x, w: jax.lax.with_sharding_constraint(jnp.tanh(x @ gather(w)), rows)
scanned = lambda x, ws: jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]
def looped(x, ws):
    for i in range(7):
        x = layer(x, ws[i])
    return x
shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (7, 128, 128))]
for f in (scanned, looped):
    gradient = jax.jit(jax.grad(lambda ws, x: f(x, ws).sum()), in_shardings=(whole, rows), out_shardings=whole)
    forward = jax.jit(f, in_shardings=(rows, split), out_shardings=rows)
    texts = gradient.lower(*shapes[::-1]).compile().as_text(), forward.lower(*shapes).compile().as_text()
    print(json.dumps([hlo.by_kind(hlo.collectives(text)) for text in texts]))
"""


def test_collectives_of_a_scan_are_those_of_its_layers():
    """Seven layers over eight devices: the gradients that data parallelism sums, the weights that sharding gathers."""
    done = subprocess.run([sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    weights = 7 * 128 * 128 * 4
    for line in done.stdout.splitlines():
        gradient, forward = json.loads(line)
        assert {kind: found[1] for kind, found in gradient.items()} == {"all-reduce": weights}
        assert {kind: found[1:] for kind, found in forward.items()} == {"all-gather": [weights, weights * 7 / 8]}
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.slow
def test_a_step_against_the_formula():
    """Three forward passes over full rows, as dense attention works on whole rows, and over all slots, as pooling works
    on empty ones; less the gradient that pixels do not need, plus the logits that attention's backward pass repeats."""
    config, mesh, _ = step.adapt(small(attention="dense"), jax.devices("cpu")[:1])
    rows = step.rows_of(config)
    compiled = step.compile_step(config, mesh, rows)
    model, _, _ = navit.for_classes(config, rows.classes)
    b, length, width = config.packing.rows_per_step, rows.plan["length"], model.width
    pixels = 2 * b * length * model.patch_size**2 * model.channels * width
    logits = model.depth * b * 2 * length**2 * width
    lengths = ([length] + [0] * (rows.plan["slots"] - 1)) * b
    expected = 3 * navit.flops_forward(model, lengths) - pixels + logits
    assert hlo.flops(compiled.text) == pytest.approx(expected, rel=0.01)


def test_texts_that_are_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        read("module @jit_f {}")


def test_the_compilers_note_is_believed():
    begin, condition, body = loop("w", 0, 5, [REDUCE])
    begin = (*begin[:-1], begin[-1] + ', backend_config={"known_trip_count":{"n":"9"}}')
    entry = ["%p = f32[4,8] parameter(0)", *begin, "ROOT %out = f32[4,8] get-tuple-element(%w), index=1"]
    program = read(text(entry, ADD, condition, body))
    assert trip_count(program, "main", program.computations["main"]["w"]) == 9
