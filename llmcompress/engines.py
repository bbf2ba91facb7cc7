"""Which engines load a checkpoint, and why not where one does not. From config.json alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VLLM_SYMMETRIC_BITS = (2, 3, 4, 8)
VLLM_ASYMMETRIC_BITS = (4, 8)
VLLM_GROUPS = (-1, 32, 64, 128)
VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one matrix each in its models
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)  # values of its --max-lora-rank
GGUF_BITS = (2, 4, 8)
WITH_ADAPTER = {
    "transformers": "adapter/ with the peft package",
    "vLLM": "adapter/ with --enable-lora",
    "GGUF converters": "without adapter/, which llama.cpp's convert_lora_to_gguf.py is for",
}
WITHOUT_THRESHOLDS = "with all weights for every token: only llmcompress.load applies the thresholds"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one engine loads the checkpoint."""

    engine: str
    loads: bool
    why: str


def verdicts(config: Mapping[str, Any], *, adapter: bool = False, thresholds: bool = False) -> list[dict[str, Any]]:
    """What transformers, vLLM and GGUF converters make of a folder with this config.json.

    adapter: and with LoRA.  thresholds: and with a file of activation thresholds.
    """
    found = verdicts_on_weights(config)
    if thresholds and found[0]["engine"] != "llmcompress":
        found.insert(0, asdict(Verdict("llmcompress", True, "llmcompress.load(folder), which applies its thresholds")))
    for row in found:
        if adapter and row["loads"]:
            row["why"] += f"; {WITH_ADAPTER[row['engine']]}"
        if thresholds and row["loads"] and row["engine"] != "llmcompress":
            row["why"] += f"; {WITHOUT_THRESHOLDS}"
    return found


def verdicts_on_weights(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same of the model alone."""
    quantization = config.get("quantization_config")
    unlike, own = "per_layer_config" in config, (quantization or {}).get("quant_method") == "llmcompress"
    if unlike and not own:
        return [asdict(verdict) for verdict in unlike_verdicts(packed=bool(quantization))]
    if not quantization:
        return [asdict(verdict) for verdict in dense_verdicts(config)]
    if own:
        return [asdict(verdict) for verdict in own_verdicts(quantization.get("format", ""), unlike=unlike)]
    grids = [group["weights"] for group in quantization["config_groups"].values()]
    vllm = vllm_verdict(grids)
    if vllm.loads and (partners := unlike_partners(quantization)):
        vllm = Verdict("vLLM", False, partners)
    return [asdict(verdict) for verdict in (transformers_verdict(grids), vllm, gguf_verdict(grids))]


def dense_verdicts(config: Mapping[str, Any]) -> list[Verdict]:
    """Plain weights load where the engine reads every size from config.json; some sizes have engines that do not."""
    plain = "plain weights, as any engine that knows the architecture reads them"
    kind, heads, head_dim = (config.get(key) for key in ("model_type", "num_attention_heads", "head_dim"))
    vllm, gguf = Verdict("vLLM", True, plain), Verdict("GGUF converters", True, plain)
    if kind == "qwen2" and heads and head_dim and heads * head_dim != config.get("hidden_size"):
        vllm = Verdict("vLLM", False, "its Qwen2 computes the size of a head from the hidden size, and heads have gone")
    layers = config.get("layer_types") or []
    full = [i for i, layer in enumerate(layers) if layer == "full_attention"]
    if kind == "gemma3_text" and full != list(range(5, len(layers), 6)):
        gguf = Verdict("GGUF converters", False, "llama.cpp takes every sixth block for one with full attention")
    return [Verdict("transformers", True, plain), vllm, gguf]


def unlike_verdicts(*, packed: bool) -> list[Verdict]:
    """Blocks that differ in width need the code that is in the folder."""
    padded = "knows one width for all blocks; llmcompress export DIR --pad-to-uniform writes a dense form that it loads"
    uniform = "knows one width for all blocks; a recipe with uniform widths makes what it loads"
    code = (
        "only with trust_remote_code=True, which runs modeling_llmcompress.py of the folder; without, transformers "
        "stops at the shapes, or warns that it makes up weights of an attention or MLP that is gone"
    )
    return [
        Verdict("transformers", True, code + (", and the compressed-tensors package" if packed else "")),
        Verdict("vLLM", False, uniform if packed else padded),
        Verdict("GGUF converters", False, uniform if packed else padded),
    ]


def own_verdicts(name: str, *, unlike: bool) -> list[Verdict]:
    """A format of this project needs its runtime; every such folder also has a form for stock engines.

    unlike: blocks differ in width, which needs the code in the folder too.
    """
    code = ", with trust_remote_code=True" if unlike else ""
    other = f"not as {name}; write a form that it loads with: llmcompress export DIR --format dense"
    return [
        Verdict(
            "llmcompress", True, f"llmcompress.load(folder), or import llmcompress.runtime before from_pretrained{code}"
        ),
        Verdict("transformers", False, "stops at the shapes unless llmcompress.runtime is imported"),
        Verdict("vLLM", False, other),
        Verdict("GGUF converters", False, other),
    ]


def transformers_verdict(grids: list[dict[str, Any]]) -> Verdict:
    """compressed-tensors is a stock quantizer of transformers; one release refuses packed zero points."""
    if all(grid["symmetric"] for grid in grids):
        return Verdict("transformers", True, "5.15 and later, with the compressed-tensors package")
    return Verdict(
        "transformers",
        True,
        "5.15 and later, with the compressed-tensors package; 5.23.0 refuses asymmetric groups unless given "
        "quantization_config=CompressedTensorsConfig(dequantize=True)",
    )


def vllm_verdict(grids: list[dict[str, Any]]) -> Verdict:
    """vLLM's weight-only integer kernels take some widths only."""
    for grid in grids:
        bits, group = grid["num_bits"], grid.get("group_size") or -1
        allowed = VLLM_SYMMETRIC_BITS if grid["symmetric"] else VLLM_ASYMMETRIC_BITS
        kind = "symmetric" if grid["symmetric"] else "asymmetric"
        if bits not in allowed:
            return Verdict("vLLM", False, f"{kind} {bits}-bit weights have no kernel there; {kind} {allowed} have")
        if group not in VLLM_GROUPS:
            return Verdict("vLLM", False, f"groups of {group} have no kernel there")
    return Verdict("vLLM", True, "through its compressed-tensors loader (weight-only integer kernels)")


def unlike_partners(quantization: Mapping[str, Any]) -> str | None:
    """Linears that vLLM fuses into one, and that are not all compressed alike here; None if there are none."""
    scheme = dict.fromkeys(quantization.get("ignore", []), "none")
    for name, group in quantization["config_groups"].items():
        scheme |= {target: name for target in group.get("targets", []) if "." in target}
    for module in scheme:
        parent, _, leaf = module.rpartition(".")
        partners = next((names for names in VLLM_FUSED if leaf in names), ())
        found = {name: scheme.get(f"{parent}.{name}", "the common one") for name in partners}
        if len(set(found.values())) > 1:
            schemes = ", ".join(f"{name}: {found[name]}" for name in partners)
            return f"it fuses {', '.join(partners)}, which need one scheme; in {parent} they have {schemes}"
    return None


def gguf_verdict(grids: list[dict[str, Any]]) -> Verdict:
    """llama.cpp's convert_hf_to_gguf.py unpacks one kind of packed weights, read from its source."""
    dense = "; run the recipe with `output: {format: dense}` and convert that folder"
    if len(grids) > 1:
        return Verdict("GGUF converters", False, "convert_hf_to_gguf.py takes one config group only" + dense)
    if not grids[0].get("group_size"):
        return Verdict("GGUF converters", False, "convert_hf_to_gguf.py unpacks groups, not whole rows" + dense)
    if grids[0]["num_bits"] not in GGUF_BITS:
        return Verdict("GGUF converters", False, "convert_hf_to_gguf.py needs widths that divide a 32-bit word" + dense)
    return Verdict("GGUF converters", True, "llama.cpp's convert_hf_to_gguf.py unpacks grouped integer weights")
