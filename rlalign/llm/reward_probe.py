"""`rlalign check my.py:reward`: try a reward on samples in seconds, before a model is loaded. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlalign.llm.reward_place import where_it_failed
from rlalign.training.reward_call import Reply, RewardLoadError, RowResult
from rlalign.training.reward_function import RewardFunction
from rlalign.training.reward_isolation import make_runner
from rlalign.training.reward_process import RewardProcess
from rlalign.training.reward_request import Request
from rlalign.training.reward_rescue import Runner
from rlalign.training.untrusted_text import one_line

_PROVIDED = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"})
_COMPLETIONS = [
    "4",
    "The answer is \\boxed{4}.",
    "<think>\n2 and 2 make 4.\n</think>\n<answer>4</answer>",
    "5",
    "I do not know.",
]
_SLOW_S = 2.0
_FIXES = {
    "raised": "correct that line; for a completion that it cannot judge it should return 0 or None",
    "timeout": "make it faster or bound its loops, or raise `guard.timeout_s`",
    "died": "take out exits (os._exit) and what crashes; if memory ran out, raise `guard.memory_limit_gb`",
    "wrong_shape": "return a list with one finite number, bool or None per completion",
    "bad_type": "return a list with one finite number, bool or None per completion",
    "not_finite": "return None where the reward is undefined",
    "too_large": "divide the reward by its usual size",
    "not_run": "mend what failed before it",
}
"""What helps against each kind of failure."""


@dataclass(frozen=True)
class Probe:
    """One thing that was tried."""

    name: str
    status: Literal["pass", "note", "FAIL"]
    detail: str
    fix: str = ""


@dataclass
class ProbeReport:
    """What was tried and what came of it. `str()` of it is the table that `rlalign check` prints."""

    title: str
    probes: list[Probe] = field(default_factory=list)
    scored: list[tuple[float | None, str, str]] = field(default_factory=list)
    """Reward, answer and completion of the samples."""
    written: str | None = None
    """How a config names the function."""

    @property
    def ok(self) -> bool:
        return all(probe.status != "FAIL" for probe in self.probes)

    def add(self, name: str, status: Literal["pass", "note", "FAIL"], detail: str, fix: str = "") -> None:
        self.probes.append(Probe(name, status, detail, fix))

    def __str__(self) -> str:
        width = max((len(probe.name) for probe in self.probes), default=0)
        lines = [f"reward {self.title}"]
        for probe in self.probes:
            lines.append(f"  {probe.status}  {probe.name:<{width}}  {probe.detail}")
            lines += [f"        {'':<{width}}fix: {probe.fix}"] if probe.fix else []
        if self.scored:
            lines += [f"  {'reward':>8}  {'answer':<12}  completion", *map(_scored_line, self.scored)]
        failed = sum(probe.status == "FAIL" for probe in self.probes)
        if not self.ok:
            return "\n".join([*lines, f"{failed} of {len(self.probes)} probes failed"])
        in_config = [] if self.written is None else ["in a config:", "rewards:", f"  - function: {self.written}"]
        return "\n".join([*lines, "ready to train with", *in_config])


def probe(
    function: RewardFunction,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    timeout_s: float = 10.0,
    written: str | None = None,
) -> ProbeReport:
    """Import the function, call it on ordinary and on nasty completions, and tell what a run would meet.

    Args:
        rows: Samples with `prompt`, `completion` and the data's other columns. Without them the samples ask for 2 + 2,
            and columns the function needs are filled with "4".
        timeout_s: Longest a single call may take.
        written: How a config names the function; the report then ends with the lines to copy.
    """
    report = ProbeReport(f"{function.name} ({function.import_path or 'a Python object'})", written=written)
    runner = make_runner(function, "auto", start_timeout_s=max(60.0, timeout_s))
    try:
        runner.prepare()
    except RewardLoadError as error:
        place = where_it_failed(error.detail)
        report.add("import", "FAIL", error.what + (f" at {place}" if place else ""), _import_fix(error.what))
        return report
    try:
        prober = _Prober(runner, report, timeout_s)
        prober.tell_where_it_runs()
        if "samples" in runner.required:
            report.add("samples", "note", "it judges what a generator draws, and is called in a run's first evaluation")
            return report
        prober.run(_samples(runner, function, rows, report))
    finally:
        runner.close()
    return report


class _Prober:
    def __init__(self, runner: Runner, report: ProbeReport, timeout_s: float) -> None:
        self.runner, self.report, self.timeout_s = runner, report, timeout_s

    def run(self, samples: Request) -> None:
        request = self._format(samples)
        if request is None:
            return
        self._repeat_and_order(request)
        self._nasty(request)
        self._speed(request)

    def _ask(self, request: Request) -> Reply:
        self.runner.begin(request)
        return self.runner.finish(self.timeout_s)

    def tell_where_it_runs(self) -> None:
        seconds = f"{self.runner.load_seconds:.2f} s"
        if isinstance(self.runner, RewardProcess):
            torch_note = ", torch with it" if self.runner.imports_torch else ""
            self.report.add("import", "pass", f"in a process of its own, in {seconds}{torch_note}")
        else:
            fix = "move it to the top level of a file: then a hang or crash costs one row, not the run"
            self.report.add("import", "note", "runs inside the trainer: a crash would end the run", fix)

    def _format(self, samples: Request) -> Request | None:
        """Plain text or chat messages: which of the two does it take?"""
        chat = _as_chat(samples)
        plain, talked = _first_failure(self._ask(samples)), _first_failure(self._ask(chat))
        plain_problem, chat_problem = _told(plain), _told(talked)
        if plain is not None and talked is not None:
            other = "" if talked.message == plain.message else f"; with chat messages it {chat_problem}"
            self.report.add("samples", "FAIL", f"it {plain_problem}{other}", _FIXES[plain.status])
            return None
        if plain_problem:
            self.report.add(
                "samples", "note", f"chat messages only (as text it {plain_problem})", "use conversational prompts"
            )
            return chat
        detail = "plain text only" if chat_problem else "plain text and chat messages"
        self.report.add(
            "samples",
            "note" if chat_problem else "pass",
            detail + (f" (as chat it {chat_problem})" * bool(chat_problem)),
        )
        return samples

    def _repeat_and_order(self, request: Request) -> None:
        first = self._ask(replace(request, watch_inputs=True))
        again = self._ask(request)
        values = [result.value for result in first.results]
        if values == [result.value for result in again.results]:
            self.report.add("repeatable", "pass", "same rows, same rewards")
        else:
            fix = "keep no state between calls: a resumed run could not repeat it"
            self.report.add("repeatable", "FAIL", "the same rows got other rewards the second time", fix)
        backwards = self._ask(request.take(range(request.rows - 1, -1, -1)))
        if values != [result.value for result in backwards.results][::-1]:
            self.report.add("order", "note", "a row's reward depends on the other rows of its batch")
        if first.mutated:
            self.report.add("inputs", "note", "it changes its arguments; they are copies, so no harm is done")
        known = {value for value in values if value is not None}
        shown = ", ".join("None" if value is None else f"{value:g}" for value in values)
        answers = request.columns.get("answer", [""] * request.rows)
        self.report.scored = [
            (value, str(answer), _text(completion))
            for value, answer, completion in zip(values, answers, request.columns["completions"], strict=True)
        ]
        if len(known) > 1:
            self.report.add("signal", "pass", f"rewards of the samples: {shown}")
        else:
            fix = "pass rows of your data with right and wrong completions; equal rewards teach nothing"
            self.report.add("signal", "note", f"all samples got the same: {shown}", fix)

    def _nasty(self, request: Request) -> None:
        for name, text in {
            "empty": "",
            "100,000 characters": "word " * 20_000,
            "nested brackets": "\\boxed{" * 500 + "(" * 500,
            "odd characters": "\x00\u202e\ud83d\ude00\ufffd<|im_end|>" * 20,
            "code": "__import__('os').system('true') 9**9**9",
        }.items():
            failed = _first_failure(self._ask(_with_completion(request.take([0]), text)))
            if failed is not None:
                self.report.add(name, "FAIL", f"it {_told(failed)}", _FIXES[failed.status])
            else:
                self.report.add(name, "pass", "scored")

    def _speed(self, request: Request) -> None:
        many = request.take([i % request.rows for i in range(64)])
        reply = self._ask(many)
        failed = _first_failure(reply)
        if failed is not None:
            self.report.add("speed", "FAIL", f"64 rows: it {_told(failed)}", _FIXES[failed.status])
        elif reply.seconds > _SLOW_S:
            self.report.add("speed", "note", f"64 rows take {reply.seconds:.1f} s; every training step waits for them")
        else:
            self.report.add("speed", "pass", f"64 rows take {1000 * reply.seconds:.0f} ms")


def _first_failure(reply: Reply) -> RowResult | None:
    """What is wrong with an answer; None when nothing is."""
    if reply.error is not None:
        return reply.error
    return next((result for result in reply.results if result.failed), None)


def _told(failed: RowResult | None) -> str:
    """A failure in a few words, with the line of the user's file; empty for none."""
    if failed is None:
        return ""
    place = where_it_failed(failed.detail)
    return failed.message + (f" at {place}" if place else "")


def _import_fix(what: str) -> str:
    if "ModuleNotFoundError" in what or "ImportError" in what:
        return "install what is missing into this Python environment, or correct the import"
    return "make the file importable on its own: `python FILE` must end without an error"


def _scored_line(row: tuple[float | None, str, str]) -> str:
    reward, answer, completion = row
    shown = "None" if reward is None else f"{reward:g}"
    return f"  {shown:>8}  {one_line(answer, limit=12):<12}  {one_line(completion, limit=60)}"


def _samples(
    runner: Runner, function: RewardFunction, rows: Sequence[Mapping[str, Any]] | None, report: ProbeReport
) -> Request:
    rows = rows or _task_rows(function)
    if rows:
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
        prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    else:
        columns, completions = {}, list(_COMPLETIONS)
        prompts = ["What is 2 + 2?"] * len(completions)
    needed = [name for name in runner.required if name not in _PROVIDED and name not in columns]
    if needed:
        report.add("columns", "note", f"the data set must have: {', '.join(needed)}")
    # Ids stand for tokens here; a reward that decodes them has a tokenizer of its own and gets some text or other.
    ids = [[len(word) for word in str(text).split()] for text in completions]
    usual = {"answer", "solution", "target", "ground_truth", "label"} - set(columns)
    filled = {name: ["4"] * len(prompts) for name in [*needed, *(usual if not rows else ())]}
    everything = {"prompts": prompts, "completions": completions, "completion_ids": ids, **columns, **filled}
    return Request(rows=len(prompts), columns=everything, trainer_state={"global_step": 0, "max_steps": 1})


def _task_rows(function: RewardFunction) -> list[dict[str, Any]]:
    task = function.arguments.get("task")
    if function.import_path is None or not function.import_path.endswith(":ReasoningGymReward") or task == "auto":
        return []
    import reasoning_gym

    config = {"size": 4, "seed": 0} | {k: v for k, v in function.arguments.items() if k != "task"}
    entries = list(reasoning_gym.create_dataset(str(task), **config))[:4]
    return [
        {
            "prompt": entry["question"],
            "completion": f"<answer>{entry['answer']}</answer>" if i % 2 == 0 else "<answer>no idea</answer>",
            "answer": entry["answer"],
            "metadata": entry["metadata"],
        }
        for i, entry in enumerate(entries)
    ]


def _as_chat(request: Request) -> Request:
    prompts = [[{"role": "user", "content": text}] for text in request.columns["prompts"]]
    completions = [[{"role": "assistant", "content": text}] for text in request.columns["completions"]]
    columns = request.columns | {"prompts": prompts, "completions": completions}
    return replace(request, columns=columns)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _with_completion(request: Request, text: str) -> Request:
    chat = isinstance(request.columns["completions"][0], list)
    completion: Any = [{"role": "assistant", "content": text}] if chat else text
    return replace(request, columns=request.columns | {"completions": [completion]})
