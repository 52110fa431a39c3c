import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import ConfigError
from core.sampling import SamplingParams
from engine.build import build_executor
from engine.config import EngineConfig
from engine.executor import Executor
from engine.loader.load import weight_bytes
from engine.models.config import parse_model_config, read_model_config
from engine.plan import Chunk, SampleSpec, StepPlan
from tests.support.models import make_checkpoint, make_gguf

PROMPT = list(range(10, 30))
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}

PHI3 = {"architectures": ["Phi3ForCausalLM"]}


def build(path: Path, **settings: Any) -> Executor:
    return build_executor(EngineConfig(model=str(path), num_blocks=8, num_threads=1, **settings))


def output(executor: Executor) -> tuple[int | None, Any]:
    spec = SampleSpec(SamplingParams(temperature=0, logprobs=20), 0, (), ())
    result = executor.submit(StepPlan([Chunk("a", PROMPT, 0, [3, 1], spec)])).wait()
    return result.token_ids[0], result.logprobs[0]


def test_gguf_file_computes_what_its_folder_computes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    assert output(build(make_gguf(folder))) == output(build(folder))


def test_shards_compute_what_one_file_computes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    whole = output(build(path))
    weights = list(load_file(path / "model.safetensors").items())
    (path / "model.safetensors").unlink()
    save_file(dict(weights[::2]), path / "model-00001-of-00002.safetensors")
    save_file(dict(weights[1::2]), path / "model-00002-of-00002.safetensors")
    save_file({"norm.weight": torch.zeros(2)}, path / "consolidated.safetensors")
    assert output(build(path)) == whole


@pytest.mark.parametrize("arch", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_stacked_experts_compute_what_single_ones_compute(arch: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, arch)
    single = output(build(path))
    stacked = tmp_path / "stacked"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(stacked, save_original_format=False)
    names = load_file(stacked / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert output(build(stacked)) == single
    # As transformers 5 writes them back by default.
    model.save_pretrained(tmp_path / "again")
    assert len(load_file(tmp_path / "again" / "model.safetensors")) > len(names)
    assert output(build(tmp_path / "again")) == single


def test_dummy_weights_follow_the_seed_and_need_no_files(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "Qwen3ForCausalLM")
    (path / "model.safetensors").unlink()
    first = build(path, load_format="dummy", seed=1)
    again = build(path, load_format="dummy", seed=1)
    other = build(path, load_format="dummy", seed=2)
    assert output(first) == output(again) != output(other)
    assert first.model_digest == again.model_digest != other.model_digest


def _without(weights: dict[str, torch.Tensor], name: str) -> None:
    del weights[name]


def _extra(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = torch.zeros(2)


def _reshaped(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name][1:].contiguous()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_without, "model.layers.1.mlp.up_proj.weight"),
        (_reshaped, "model.layers.1.mlp.up_proj.weight"),
        (_extra, "model.layers.1.mlp.up_proj.bias"),
        (_without, "lm_head.weight"),
    ],
)
def test_missing_misshapen_or_surplus_weights_are_refused_by_name(
    change: Any, name: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path)
    weights = load_file(path / "model.safetensors")
    change(weights, name)
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ConfigError, match=name):
        build(path)


@pytest.mark.parametrize(
    ("change", "stored", "name"),
    [
        (_reshaped, "self_attn.qkv_proj", "layers.1.self_attn.k_proj.weight has shape"),
        (_without, "self_attn.o_proj", "lacks the weight model.layers.1.self_attn.q_proj"),
        (_without, "self_attn.qkv_proj", "lacks the weight model.layers.1.self_attn.q_proj"),
        (_reshaped, "mlp.gate_up_proj", "layers.1.mlp.gate_proj.weight has shape"),
        (_extra, "mlp.up_proj", "holds model.layers.1.mlp.up_proj.weight twice"),
    ],
)
def test_fused_weights_that_do_not_fit_are_refused(
    change: Any, stored: str, name: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, "Phi3ForCausalLM")
    weights = load_file(path / "model.safetensors")
    change(weights, f"model.layers.1.{stored}.weight")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ConfigError, match=name):
        build(path)


def test_broken_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="safetensors"):
        build(path)


def test_context_longer_than_the_models_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, max_position_embeddings=128)
    with pytest.raises(ConfigError, match="128"):
        build(path, max_model_len=129)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "moe_intermediate_size"),
        ({**MIXTRAL, "num_local_experts": 1}, "2 experts per token"),
        ({**MIXTRAL, "sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({**PHI3, "rope_scaling": {"type": "su"}, "partial_rotary_factor": 0.75}, "'su'"),
        ({**PHI3, "rope_scaling": {"type": "yarn"}}, "'yarn' .* these are: default"),
        ({**PHI3, "partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "uantised"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
    ],
)
def test_unsupported_configuration_is_refused_by_name(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    raw = json.loads((make_checkpoint(tmp_path) / "config.json").read_text())
    with pytest.raises(ConfigError, match=named):
        parse_model_config({**raw, **change}, ())


def test_layers_with_experts_are_those_that_the_configuration_names(tmp_path: Path) -> None:
    raw = json.loads((make_checkpoint(tmp_path, "Qwen3MoeForCausalLM") / "config.json").read_text())
    raw["num_hidden_layers"] = 7
    found = parse_model_config({**raw, "decoder_sparse_step": 3, "mlp_only_layers": [5]}, ())
    assert found.experts is not None and found.experts.layers == {2}
    renamed = {**raw, "num_local_experts": raw["num_experts"]}
    del renamed["num_experts"]
    assert parse_model_config(renamed, ()) == parse_model_config(raw, ())
    assert parse_model_config({**raw, "mlp_only_layers": list(range(7))}, ()).experts is None


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("Phi3ForCausalLM", {}),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
        ("MixtralForCausalLM", {}),
    ],
)
def test_matrices_of_all_experts_count(arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, arch, **changes)
    weights = load_file(path / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    expected = sum(each.nbytes for each in weights.values() if each.dim() == 2)
    assert weight_bytes(read_model_config(path), torch.float32) == expected


def test_rope_parameters_of_both_transformers_versions_are_read(tmp_path: Path) -> None:
    raw = json.loads((make_checkpoint(tmp_path) / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = parse_model_config({**raw, "rope_theta": 5e5, "rope_scaling": scaling}, ())
    del raw["rope_theta"]
    new = parse_model_config({**raw, "rope_parameters": {**scaling, "rope_theta": 5e5}}, ())
    assert old == new
    assert (new.rope.theta, new.rope.factor) == (5e5, 2.0)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert read_model_config(path).eos_token_ids == (2, 9)
    (path / "generation_config.json").unlink()
    assert read_model_config(path).eos_token_ids == (2,)


def test_describing_a_model_loads_no_torch(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    gguf = make_gguf(path)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from core.modelfile.description import read_config, read_tokenizer\n"
        "from core.modelfile.digest import model_digest\n"
        "import core.modelfile.demo, engine.threads\n"
        f"for path in (Path({str(path)!r}), Path({str(gguf)!r})):\n"
        "    read_config(path), read_tokenizer(path), model_digest(path)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
