"""DeepSpeed JSON against the recipe: `"auto"` is filled, what disagrees is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from fd_scale.config import Recipe
from fd_scale.ds_config import UNSERVED, ZERO_KEYS, read, resolve, zero_stage
from fd_scale.errors import UserError

MakeRecipe = Callable[..., Recipe]
SHIPPED = ["zero0", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name in SHIPPED for precision in ("fp32", "bf16", "fp16")][:2]
    + [(name, precision) for name in SHIPPED[1:] for precision in ("fp32", "bf16", "fp16")],
)
def test_shipped_files_are_filled(make_recipe: MakeRecipe, name: str, precision: str) -> None:
    config = read(name)
    recipe = make_recipe(train__precision=precision, train__global_batch=48, optim__grad_clip=0.05)
    resolved = resolve(config, recipe, 2, "cuda")
    assert zero_stage(resolved) == int(name[-1])
    assert '"auto"' not in json.dumps(resolved)
    expected = {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.05,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a micro-batch
    }
    assert {key: resolved[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "precision", "micro_batch", "given", "expected"),
    [
        ("zero1", "bf16", 8, {}, "fp32"),
        ("zero3", "bf16", 8, {"data_types": {}}, "fp32"),
        ("zero2", "bf16", 8, {"data_types": {"grad_accum_dtype": "bf16"}}, "bf16"),
        ("zero1", "bf16", 24, {}, None),  # one micro-batch: there is nothing to sum
        ("zero1", "fp32", 8, {}, None),
        ("zero0", "bf16", 8, {}, None),  # DeepSpeed does not know it there
        ("zero2", "bf16", 8, {"data_types": {"grad_accum_dtype": "auto"}}, "fp32"),
        (
            "zero2",
            "bf16",
            8,
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            None,
        ),
        ("zero3_offload_optimizer", "bf16", 8, {}, "fp32"),
    ],
)
def test_gradients_of_bf16_micro_batches_are_summed_in_fp32(
    make_recipe: MakeRecipe,
    name: str,
    precision: str,
    micro_batch: int,
    given: dict[str, Any],
    expected: str | None,
) -> None:
    recipe = make_recipe(train__precision=precision, train__global_batch=48, train__micro_batch=micro_batch)
    resolved = resolve(read(name) | given, recipe, 2, "cpu")
    assert resolved.get("data_types", {}).get("grad_accum_dtype") == expected


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("largest_micro_batch", [1, 3, 8, 100])
def test_the_batch_is_the_same_on_any_number_of_ranks(
    make_recipe: MakeRecipe, world_size: int, largest_micro_batch: int
) -> None:
    recipe = make_recipe(train__global_batch=48, train__micro_batch=largest_micro_batch)
    resolved = resolve({}, recipe, world_size, "cpu")
    micro_batch = resolved["train_micro_batch_size_per_gpu"]
    assert (
        micro_batch * resolved["gradient_accumulation_steps"] * world_size
        == resolved["train_batch_size"]
        == 48
    )
    assert micro_batch <= largest_micro_batch
    larger = range(micro_batch + 1, min(largest_micro_batch, 48 // world_size) + 1)
    assert all((48 // world_size) % size for size in larger), "it is the largest that fits"


def test_a_batch_that_does_not_divide_over_the_ranks(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"16 images do not divide over 3 ranks; set train.global_batch=15"):
        resolve(read("zero2"), make_recipe(), 3, "cpu")


def test_contrastive_training_takes_a_step_in_one_pass(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("contrastive")  # 16 images a step, 8 a forward pass
    with pytest.raises(
        UserError, match=r"8 x 1 ranks are fewer than train.global_batch=16; raise train.micro_batch"
    ):
        resolve(read("zero1"), recipe, 1, "cpu")
    assert resolve(read("zero1"), recipe, 2, "cpu")["gradient_accumulation_steps"] == 1


def test_fp16_needs_a_gpu(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"no fp16 on a CPU; set train.precision=bf16"):
        resolve(read("zero1"), make_recipe(train__precision="fp16"), 1, "cpu")


def test_equal_values_are_accepted_and_others_kept(make_recipe: MakeRecipe) -> None:
    given = {
        "train_batch_size": 16,
        "gradient_clipping": 0.05,
        "bf16": {"enabled": False, "immediate_grad_update": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": "auto"}},
        "steps_per_print": 3,
    }
    before = copy.deepcopy(given)
    resolved = resolve(given, make_recipe(optim__grad_clip=0.05), 1, "cpu")
    assert given == before, "what was given stays as it is"
    assert resolved["bf16"]["immediate_grad_update"] is True
    assert resolved["zero_optimization"] == given["zero_optimization"]
    assert resolved["steps_per_print"] == 3
    assert "optimizer" not in resolved, "the recipe's optimizer is handed over built"


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}])
def test_no_stage_is_stage_0(config: dict[str, Any]) -> None:
    assert zero_stage(config) == 0


def test_fp16_needs_a_stage_that_scales_the_loss(make_recipe: MakeRecipe) -> None:
    with pytest.raises(
        UserError, match=r"at ZeRO stage 0 DeepSpeed divides fp16 gradients.*set train\.ds_config=zero1"
    ):
        resolve(read("zero0"), make_recipe(train__precision="fp16"), 1, "cuda")


def test_a_misspelt_section_and_offload_elsewhere_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimisation": {"stage": 3}}')
    with pytest.raises(UserError, match="zero_optimisation; did you mean zero_optimization"):
        read(str(file))
    file.write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    with pytest.raises(UserError, match=r"zero_optimization\.overlap_com; did you mean .*\.overlap_comm"):
        read(str(file))
    file.write_text('{"data_types": {"grad_accum_dtype": "fp8"}}')
    with pytest.raises(UserError, match=r'grad_accum_dtype is "fp8" in .*, expected one of fp32, bf16, fp16'):
        read(str(file))
    file.write_text('{"data_types": null}')
    with pytest.raises(UserError, match=r"data_types is null in .*, expected an object"):
        read(str(file))
    file.write_text('{"sparse_gradients": true}')
    with pytest.raises(UserError, match=r"sparse_gradients in .* is not served: DeepSpeed has it no more"):
        resolve(read(str(file)), make_recipe(), 1, "cpu")
    file.write_text('{"bf16": {"enabled": "auto"}, }  // mine')
    with pytest.raises(UserError, match="is not JSON, which has no comments and no comma behind"):
        read(str(file))
    file.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}')
    with pytest.raises(UserError, match=r"offload_optimizer\.device is nvme in .*, expected cpu or none"):
        resolve(read(str(file)), make_recipe(), 1, "cpu")
    file.write_text('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}')
    with pytest.raises(UserError, match=r"offload_param in .* needs ZeRO stage 3 or above, got 2"):
        resolve(read(str(file)), make_recipe(), 1, "cpu")
    file.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}')
    assert zero_stage(resolve(read(str(file)), make_recipe(), 1, "cpu")) == 3


@pytest.mark.parametrize("key", UNSERVED)
def test_what_is_not_served_is_refused_and_what_is_off_is_not(make_recipe: MakeRecipe, key: str) -> None:
    *section, last = key.split(".")
    for value in (True, {"enabled": True}, 2):
        config = {section[0]: {last: value}} if section else {last: value}
        with pytest.raises(UserError, match=rf"{key} in .* is not served: .*; remove it"):
            resolve(config, make_recipe(), 1, "cpu")
    config = {section[0]: {last: False}} if section else {last: {"enabled": False}}
    if "DeepSpeed has it no more" not in UNSERVED[key]:  # and it refuses the key
        resolve(config, make_recipe(), 1, "cpu")


@pytest.mark.parametrize("section", [{}, {"overlap_step": False}])
def test_a_section_of_zero_is_on_as_soon_as_it_is_there(
    make_recipe: MakeRecipe, section: dict[str, Any]
) -> None:
    assert DeepSpeedZeroConfig(zenflow=section).zenflow is not None, "whatever it says"
    with pytest.raises(UserError, match=r"zenflow in .* is not served: .*; remove it"):
        resolve({"zero_optimization": {"stage": 2, "zenflow": section}}, make_recipe(), 1, "cpu")


@pytest.mark.parametrize("key", ["zero_hpz_partition_size", "zero_quantized_gradients"])
def test_what_only_stage_3_has_is_refused_elsewhere(make_recipe: MakeRecipe, key: str) -> None:
    on: dict[str, Any] = {key: 2 if key == "zero_hpz_partition_size" else True}
    with pytest.raises(UserError, match=rf"{key} in .* needs ZeRO stage 3, got 2; raise the stage or remove"):
        resolve({"zero_optimization": {"stage": 2} | on}, make_recipe(), 1, "cpu")
    resolve({"zero_optimization": {"stage": 3} | on}, make_recipe(), 1, "cpu")
    resolve(
        {"zero_optimization": {"stage": 2, key: int(not key.startswith("zero_q"))}}, make_recipe(), 1, "cpu"
    )


def test_all_that_disagrees_is_told_at_once(make_recipe: MakeRecipe) -> None:
    config = {
        "scheduler": {"type": "WarmupLR"}, "amp": {"enabled": True}, "gradient_clipping": 7.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1, "eps": 1}},
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        resolve(config, make_recipe(), 1, "cpu")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    parts = ("amp", "scheduler", "gradient_clipping", "optimizer.params.lr", "optimizer.params.eps")
    assert all(part in line for part, line in zip(parts, lines, strict=True))


def test_replicas(make_recipe: MakeRecipe) -> None:
    """The engine finds their size among DeepSpeed's keys, where there is more than one."""
    config = {"zero_optimization": {"stage": 3}}

    def found(size: int, world_size: int, config: dict[str, Any] = config) -> int | None:
        recipe = make_recipe(train__mics_shard_size=size, train__global_batch=48)
        resolved: int | None = resolve(config, recipe, world_size, "cpu")["zero_optimization"].get(
            "mics_shard_size"
        )
        return resolved

    assert [found(0, 8), found(4, 8), found(2, 8), found(8, 8), found(8, 4)] == [None, 4, 2, None, None]
    for given in ("auto", 4):
        assert found(4, 8, {"zero_optimization": {"stage": 3, "mics_shard_size": given}}) == 4
    for off in (-1, 0, "auto"):
        assert found(0, 8, {"zero_optimization": {"stage": 3, "mics_shard_size": off}}) is None
    assert found(4, 8, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}) == 4
    host = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    assert found(4, 4, host) is None
    for size, wrong, sentence in (
        (
            4,
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
            "is 2 in .* but train.mics_shard_size is 4",
        ),
        (4, {"zero_optimization": {"stage": 2}}, r"=4 needs ZeRO stage 3, .* has stage 2"),
        (4, {}, r"=4 needs ZeRO stage 3, .* has stage 0"),
        (3, config, "=3 does not divide 8 ranks"),
        (
            4,
            host,
            "offload_optimizer in .* does not go with train.mics_shard_size=4: gradients are on the host",
        ),
        (
            4,
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "groups for it are of all ranks",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            found(size, 8, wrong)


def test_keys_of_zero_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields.items()
    assert set(ZERO_KEYS) == {field.alias or name for name, field in fields}


def test_sections_whose_values_are_all_off_may_stay(make_recipe: MakeRecipe) -> None:
    template = {"partition_activations": False, "cpu_checkpointing": False, "number_checkpoints": None}
    resolve({"activation_checkpointing": template}, make_recipe(), 1, "cpu")


@pytest.mark.parametrize(
    ("zero", "sentence"),
    [
        ({"offload_optimizer": "cpu"}, 'offload_optimizer is "cpu" in .*expected an object'),
        ({"stage": True}, "stage is true in .*expected 0, 1, 2 or 3"),
    ],
)
def test_wrong_types_are_one_sentence(zero: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=sentence):
        read(str(file))
