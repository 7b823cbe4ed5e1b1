"""Computes OpenUnlearning's metrics with its own code; `parity.py` starts it in an environment that need not have mpunlearn.

    python benchmarks/parity_theirs.py JOB.json

If the job says so, it does the tasks that come in on standard input instead, for `parity_time.py`. Only metrics, data sets
and single trainers are imported, so the other requirements (deepspeed, hydra, lm-eval) are not needed.
"""

import importlib
import json
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
OPTION_SETS = ("real_authors", "world_facts")
BATCH = 8


class Theirs:
    """OpenUnlearning's metrics of one model on the question sets of a folder."""

    def __init__(self, job: dict[str, Any], checkpoint: Path) -> None:
        import transformers

        sys.path.insert(0, job["source"])
        package = types.ModuleType("evals")  # its own __init__ imports lm-eval
        package.__path__ = [str(Path(job["source"]) / "evals")]
        sys.modules["evals"] = package
        self.job, self.folder = job, Path(job["folder"])
        self._batch = job.get("batch_size", BATCH)
        self._questions: dict[Any, Any] = {}
        self.metrics = importlib.import_module("evals.metrics").METRICS_REGISTRY
        self.data, self.collators = importlib.import_module("data"), importlib.import_module("data.collators")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).float().eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        if self.tokenizer.chat_template and not isinstance(
            self.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], date_string="x"), list
        ):  # transformers 5 returns a dict by default
            self.tokenizer.apply_chat_template = partial(self.tokenizer.apply_chat_template, return_dict=False)

    def metric(self, name: str, data: Any = None, **options: Any) -> Any:
        """The result of one metric."""
        given = {"tokenizer": self.tokenizer, "batch_size": self._batch, "collators": self.collator("right"), **options}
        return self.metrics[name].evaluate_metric(self.model, name, data=data, **given)

    def collator(self, side: str) -> Any:
        return self.collators.DataCollatorForSupervisedDataset(self.tokenizer, padding_side=side, index="index")

    def questions(self, file: str, answer: str = "answer", *, generate: bool = False, shots: str | None = None) -> Any:
        """A set of questions."""
        key = (file, answer, generate, shots)
        if key in self._questions:
            return self._questions[key]
        data = self.data.QADataset(
            self.rows(file),
            self.job["template_args"],
            self.tokenizer,
            answer_key=answer,
            max_length=512,
            predict_with_generate=generate,
            few_shot_dataset_hf_args=None if shots is None else self.rows(shots),
        )
        if shots is not None:  # a column is not a list in datasets 4
            data.fs_data = {name: list(column) for name, column in data.fs_data.items()}
        self._questions[key] = data
        return data

    def completions(self, file: str, *, generate: bool = False) -> Any:
        """A set of texts, in MUSE's format."""
        arguments = {"text_key": "gt", "insert_space": True} if generate else {}
        template = self.job["template_args"]
        return self.data.CompletionDataset(
            self.rows(file), template, self.tokenizer, max_length=2048, predict_with_generate=generate, **arguments
        )

    def rows(self, file: str) -> dict[str, str]:
        return {"path": "json", "data_files": str(self.folder / file), "split": "train"}

    def generated(self, data: Any, kind: str, tokens: int, stops: list[str] | None = None) -> float:
        """ROUGE-L of generated texts."""
        how = {"do_sample": False, "top_p": None, "temperature": None, "max_new_tokens": tokens, "use_cache": True}
        options = importlib.import_module("omegaconf").OmegaConf.create(
            {**how, **({"stopwords": stops} if stops else {})}
        )
        result = self.metric("rouge", data, generation_args=options, rouge_type=kind, collators=self.collator("left"))
        return float(result["agg_value"])

    def tofu(self, *, texts: bool = True) -> tuple[dict[str, float], Any]:
        """The metrics of each set, and the truth ratios of the forget set; without `texts`, nothing is generated."""
        found: dict[str, float] = {}
        ratios: Any = None
        for name, prefix in PREFIXES.items():
            options, file = name in OPTION_SETS, f"{name}.jsonl"
            answers = self.metric("probability", self.questions(file))
            wrong = self.metric("probability", self.questions(file, "perturbed_answer"))
            right = answers if options else self.metric("probability", self.questions(file, "paraphrased_answer"))
            aggregator = "closer_to_1_better" if name == "forget" else "true_better"
            ratio = self.metric("truth_ratio", pre_compute={"correct": right, "wrong": wrong}, aggregator=aggregator)
            if options:
                both = {"correct": answers, "wrong": wrong}
                normalized = self.metric("probability_w_options", pre_compute=both)
                found[f"{prefix}_Q_A_Prob_normalised"] = normalized["agg_value"]
            else:
                found[f"{prefix}_Q_A_Prob"] = answers["agg_value"]
            if texts:
                found[f"{prefix}_Q_A_ROUGE"] = self.rouge(name)
            found[f"{prefix}_Truth_Ratio"] = ratio["agg_value"]
            ratios = ratio if name == "forget" else ratios
        utility = {name: {"agg_value": value} for name, value in found.items() if not name.startswith("forget")}
        found["model_utility"] = self.metric("hm_aggregate", pre_compute=utility)["agg_value"]
        for name in ("exact_memorization", "extraction_strength"):
            found[name] = self.metric(name, self.questions("forget.jsonl"))["agg_value"]
        return found, ratios

    def rouge(self, name: str) -> float:
        """ROUGE-L recall of one set."""
        data = self.questions(f"{name}.jsonl", generate=True)
        return self.generated(data, "rougeL_recall", self.job["max_new_tokens"])

    def membership(self, *, reference: bool = True) -> dict[str, float]:
        """The AUC of every attack; without `reference`, of those that need one model only."""
        sets = {name: self.questions(f"{name}.jsonl") for name in ("forget", "holdout")}
        found = {
            "mia_loss": self.metric("mia_loss", sets),
            "mia_zlib": self.metric("mia_zlib", sets),
            "mia_min_k": self.metric("mia_min_k", sets, k=0.4),
            "mia_min_k_plus_plus": self.metric("mia_min_k_plus_plus", sets, k=0.4),
            "mia_gradnorm": self.metric("mia_gradnorm", sets, p=2, batch_size=1),
        }
        try:
            if reference:
                path = str(self.folder / "retrained")
                found["mia_reference"] = self.metric("mia_reference", sets, reference_model_path=path)
        except (ImportError, ValueError) as error:
            print(f"mia_reference is left out: {error}", file=sys.stderr)
        return {name: result["agg_value"] for name, result in found.items()}

    def muse(self) -> dict[str, float]:
        """MUSE's metrics."""
        folder, stops = "mirror/muse/news", ["\n\n", "\nQuestion", "Question:"]
        verbatim = self.completions(f"{folder}/verbmem/forget.json", generate=True)
        found = {"muse/forget_verbmem_ROUGE": self.generated(verbatim, "rougeL_f1", 128)}
        for name in ("forget", "retain"):
            files = (f"{folder}/knowmem/{name}_qa{end}.json" for end in ("", "_icl"))
            file, shots = files
            data = self.questions(file, generate=True, shots=shots)
            found[f"muse/{name}_knowmem_ROUGE"] = self.generated(data, "rougeL_f1", 32, stops)
        sets = {name: self.completions(f"{folder}/privleak/{name}.json") for name in ("forget", "holdout")}
        found["muse/mia_min_k"] = self.metric("mia_min_k", sets, k=0.4)["agg_value"]
        return found


def timed(job: dict[str, Any], folder: Path) -> None:
    """Does tasks on demand."""
    import torch

    from parity_serve import serve
    from parity_theirs_training import TRAINERS, trainer

    torch.set_num_threads(1)
    theirs = Theirs(job, folder / "model")

    def suite() -> None:
        theirs.tofu()
        theirs.membership(reference=False)

    tasks: dict[str, Callable[[], Any]] = {
        "likelihoods": partial(theirs.tofu, texts=False),
        "rouge": lambda: [theirs.rouge(name) for name in PREFIXES],
        "membership": partial(theirs.membership, reference=False),
        "suite": suite,
    }
    serve(lambda name: trainer(theirs, name, folder / "model") if name in TRAINERS else tasks[name], folder, "theirs")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(job["folder"])
    if job.get("timed"):
        timed(job, folder)
        return
    model, retrained = Theirs(job, folder / "model"), Theirs(job, folder / "retrained")
    found, ratios = model.tofu()
    logs = {"retain_model_logs": {"retain": retrained.tofu()[1]}}
    found["forget_quality"] = model.metric("ks_test", pre_compute={"forget": ratios}, reference_logs=logs)["agg_value"]
    found |= model.membership()
    aucs = {"": (found, retrained.membership())}
    if job["muse"]:
        found |= model.muse()
        aucs["muse/"] = (found, retrained.muse())
    for prefix, (own, other) in aucs.items():
        name = f"{prefix}mia_min_k"
        logs = {"retain_model_logs": {"retain": {"agg_value": other[name]}}}
        pre = {"forget": {"agg_value": own[name]}}
        found[f"{prefix}privleak"] = model.metric("privleak", pre_compute=pre, reference_logs=logs)["agg_value"]
    values = {name: float(value) for name, value in found.items()}
    (folder / "theirs.json").write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
