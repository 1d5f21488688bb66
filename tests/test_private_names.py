"""Private names of other libraries change without notice: each that is used is listed with the test that would fail."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
LIBRARIES = {"torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "peft", "pluggy", "jsonargparse"}
_ARCHIVES = "tests/tiepolicy_dcp/test_archives.py"
_MODULES = "tests/test_private_names.py::test_a_module_keeps_its_tensors_where_its_public_methods_look"
_ATTENTION = "tests/eagle3/test_kernels.py::test_merged_attention_and_all_its_gradients"
_METADATA = "tests/tiepolicy/test_metadata.py::test_what_dcp_wrote_is_read_as_dcp_reads_it"
_WRAPPERS = "tests/tiepolicy/test_observe.py::test_wrappers_change_no_name"
#: Dotted names, and attributes of objects of any type, with the test that uses each for real.
GUARDED = {
    "._MEM_FORMAT_ENCODING": _METADATA,
    "._StorageInfo": _METADATA,
    "._buffers": _MODULES,
    "._checkpoint_wrapped_module": _WRAPPERS,
    "._cdata": "tests/tiepolicy/test_observe.py::test_fake_tensors_are_told_apart",
    "._flash_attention_backward": _ATTENTION,
    "._flash_attention_forward": _ATTENTION,
    "._fsdp_wrapped_module": "tests/tiepolicy/test_facts.py::test_the_prefix_of_fsdp1_is_removed",
    "._get_layout": _METADATA,
    "._modules": _MODULES,
    "._non_persistent_buffers_set": _MODULES,
    "._orig_mod": _WRAPPERS,
    "._parameters": _MODULES,
    "._rebuild_tensor_v2": f"{_ARCHIVES}::test_a_plain_tensor_is_found_with_its_bytes",
    "._scaled_dot_product_cudnn_attention": _ATTENTION,
    "._scaled_dot_product_cudnn_attention_backward": _ATTENTION,
    "._tied_weights_keys": "tests/tiepolicy_hf/test_flags.py::test_a_t5_without_its_shared_weight_is_put_together",
    "._scaled_mm": "tests/eagle3/test_fp8.py::test_a_step_in_fp8_has_nearly_the_gradients_of_float64",
    "torch._utils._rebuild_tensor_v2": f"{_ARCHIVES}::test_a_plain_tensor_is_found_with_its_bytes",
    "torch.distributed.checkpoint.filesystem._StorageInfo": (
        f"{_ARCHIVES}::test_tensors_that_plain_dcp_wrote_in_other_layouts_are_read_as_before"
    ),
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": (
        "tests/tiepolicy/test_facts.py::test_a_wrapper_around_the_same_inner_tensors_is_the_same_tensor"
    ),
}
#: Of objects that are ours, or Python's own; strings among them.
OURS = {
    *("._Layout", "._Model", "._Unpickler", "._Value", "._load", "._open", "._save", "._tiepolicy_plan"),
    *("._trainer", "._weight"),
}
_CUDNN, _FLASH = "_scaled_dot_product_cudnn_attention", "_flash_attention"
_RANGES, _SEEDS = "cum_seq_q cum_seq_k max_q max_k", "philox_seed philox_offset"
_INPUTS, _STATES = "query key value", "grad_out query key value out logsumexp"
#: Operators that only GPUs run, with what the kernels give them by place and by name, and what they take from them.
OPERATORS = {
    f"{_FLASH}_forward": (
        *(f"{_INPUTS} {_RANGES} dropout_p is_causal return_debug_mask", "scale"),
        "output softmax_logsumexp rng_state unused",
    ),
    f"{_FLASH}_backward": (f"{_STATES} {_RANGES} dropout_p is_causal rng_state unused", "scale", ""),
    _CUDNN: (
        *(f"{_INPUTS} attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask", "scale"),
        f"output logsumexp {_RANGES} {_SEEDS}",
    ),
    f"{_CUDNN}_backward": (f"{_STATES} {_SEEDS} attn_bias {_RANGES} dropout_p is_causal", "scale", ""),
    "_scaled_mm": ("self mat2 scale_a scale_b", "out_dtype use_fast_accum out", ""),
}


def is_private(dotted):
    return any(part.startswith("_") and not part.endswith("__") for part in dotted.split("."))


def origins_of(nodes):
    """What local names stand for: libraries, modules of them, and what was imported from them."""
    origins = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            origins |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origins |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: origin for name, origin in origins.items() if origin.split(".")[0] in LIBRARIES}


def private_names(path):
    """Private names of libraries in a file.

    Attributes of other objects count where ruff was told to allow them, strings where they are such a name alone, as
    those given to `getattr` are.
    """
    source = path.read_text()
    nodes, lines = list(ast.walk(ast.parse(source))), source.splitlines()
    origins = origins_of(nodes)
    found = {origin for origin in origins.values() if is_private(origin)}
    for node in nodes:
        if isinstance(node, ast.Constant) and re.fullmatch(r"_[A-Za-z]\w*[a-zA-Z0-9]", str(node.value)):
            found.add(f".{node.value}")
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root = ast.unparse(node.value).split(".")
            if root[0] in origins:
                found.add(".".join([origins[root[0]], *root[1:], node.attr]))
            elif "SLF001" in lines[node.lineno - 1]:
                found.add(f".{node.attr}")
    return found


def test_every_private_name_of_another_library_is_known_and_every_known_one_is_used():
    files = [path for top in ("tiepolicy", "adapters", "eagle3", "examples") for path in (ROOT / top).rglob("*.py")]
    assert set(GUARDED) == set().union(*map(private_names, files)) - OURS


def test_the_tests_that_guard_private_names_exist():
    places = [place.split("::") for place in GUARDED.values()]
    assert [] == [name for file, name in places if f"\ndef {name}(" not in (ROOT / file).read_text()]


def test_a_private_name_is_found_however_it_is_reached(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\nimport torch.distributed as dist\n"
        "from torch._utils import x\nfrom transformers.models import _auto\n"
        "torch._C._log_api_usage_once('')\ndist._state._world\nmodel._flag  # noqa: SLF001\nself._own\n"
        "getattr(model, '_hidden')\nprint('_ and _more', '__name__')\n"
    )
    expected = {
        *("torch._utils.x", "transformers.models._auto", "torch._C", "torch._C._log_api_usage_once"),
        *("torch.distributed._state", "torch.distributed._state._world", "._flag", "._hidden"),
    }
    assert expected == private_names(path)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_only_gpus_run_take_and_return_what_the_kernels_say(name):
    by_place, by_name, returned = map(str.split, OPERATORS[name])
    operator = getattr(torch.ops.aten, name)
    schema = (operator.out if "out" in by_name else operator.default)._schema
    assert by_place == [argument.name for argument in schema.arguments if not argument.kwarg_only][: len(by_place)]
    assert set(by_name) <= {argument.name for argument in schema.arguments[len(by_place) :]}
    assert returned == [value.name for value in schema.returns][: len(returned)]


def test_a_module_keeps_its_tensors_where_its_public_methods_look():
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", module.running_mean, persistent=False)
    assert dict(module.named_parameters()) == {name: module._parameters[name] for name in ("weight", "bias")}
    assert dict(module.named_buffers(remove_duplicate=False)) == module._buffers
    assert {"scratch"} == module._non_persistent_buffers_set == set(module._buffers) - set(module.state_dict())
    assert [("0", module)] == list(nn.Sequential(module)._modules.items())
