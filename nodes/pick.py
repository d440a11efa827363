"""A person as the reward: asked in the browser while a run waits, or between two runs by what stands in a widget."""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..core.pictures import plot
from ..core.pictures.theme import DARK
from ..core.rewards.human import (
    HOW,
    UNDO,
    Answer,
    HumanReward,
    NobodyThere,
    Question,
    choice_scores,
    lines_of,
    parse,
    picks_for,
)
from ..core.rewards.measure import encoded
from ..core.rewards.picks import Picks, described, load_waiting, same_group, save_waiting
from ..core.runs.prompts import PromptText, note_on, share
from . import browser
from .reward import Scored, one_line, table
from .schema import PolicySocket, RewardSocket, ScoresSocket, expert, schema

POLL = 0.1  # seconds between two looks for an interrupt
TAKEN = 0.01  # and for an answer that is being written down
LARGEST = 16_384  # bytes of an answer sent to us
TEMPORARY = "treerpo_pick"  # subfolder of ComfyUI's temp folder
KEPT = 1024  # images of earlier questions that stay there


@dataclass
class Pending:
    """A question that waits for its answer."""

    asked: Question
    question: dict  # as the browser gets it, without seconds_left
    deadline: float | None  # time.monotonic(); None = no time-out
    text: str | None = None
    answered: threading.Event = field(default_factory=threading.Event)

    def public(self) -> dict:
        left = None if self.deadline is None else round(max(self.deadline - time.monotonic(), 0.0), 1)
        return {**self.question, "seconds_left": left}


class Broker:
    """Questions on their way: asked in the executor's thread, answered in the web server's."""

    def __init__(self):
        self._lock = threading.Lock()
        self._pending: dict[str, Pending] = {}

    def ask(self, question: Question, seconds: float, node_id) -> str | None:
        """The answer's text, or None when `seconds` have passed (0 = never). An interrupt ends it within a moment."""
        if browser.server() is None:
            raise NobodyThere(
                "A person can only be asked while ComfyUI's server runs: connect a fallback reward, or queue the "
                "graph in ComfyUI."
            )
        shown = shown_to_browser(question, node_id, live=True)
        pending = Pending(question, shown, time.monotonic() + seconds if seconds else None)
        with self._lock:
            self._pending[question.id] = pending
        browser.send("treerpo.pick", pending.public())
        browser.send_text(f"Waiting for your pick among {len(question.images)} images.", node_id)
        by = "interrupt"
        try:
            while not pending.answered.wait(POLL):
                comfy.model_management.throw_exception_if_processing_interrupted()
                if pending.deadline is not None and time.monotonic() > pending.deadline:
                    break
            by = "time-out"
        finally:
            with self._lock:  # from here on no answer is taken
                del self._pending[question.id]
            if by != "interrupt" and pending.text is not None:
                skipped = pending.text != UNDO and parse(pending.text, len(question.images)) is None
                by = "skip" if skipped else "person"
            browser.send("treerpo.pick_done", {"id": question.id, "by": by})
            browser.send_text("", node_id)
        return pending.text

    def questions(self) -> list[dict]:
        with self._lock:
            return [pending.public() for pending in self._pending.values()]

    def answer(self, name: str, text: str) -> Question:
        """The question that this answers; once it is `settled`, `kept` says whether the answer counts.

        Raises LookupError if no such question waits, ValueError if the answer cannot be read; one sentence each.
        """
        with self._lock:
            pending = self._pending.get(name)
            if pending is None or pending.answered.is_set():
                raise LookupError(nobody_waits(name))
            text = text.strip().lower()
            if not (text == UNDO and pending.question["undo"]):
                parse(text, pending.question["count"])
            pending.text = text
            pending.answered.set()
        return pending.asked


def nobody_waits(name: str) -> str:
    return (
        f"No question with the id '{name[:20]}' is waiting: it was answered, its time ran out, or the run was stopped."
    )


BROKER = Broker()


def shown_to_browser(question: Question, node_id, live: bool) -> dict:
    """The question in JSON's types, its images as files that ComfyUI hands out."""
    names = [f"{question.id}_{i + 1:03d}.jpg" for i in range(len(question.images))]
    folder, files = browser.temporary(TEMPORARY, names, KEPT)
    for name, image in zip(names, question.images):
        (folder / name).write_bytes(encoded(image, "JPEG"))
    return {
        "id": question.id,
        "node_id": node_id,
        "prompt": question.prompt,
        "how": question.how,
        "group": question.group,
        "groups": question.groups,
        "counted": question.counted,
        "undo": question.undo,
        "note": question.note,
        "count": len(files),
        "images": files,
        "seconds_left": None,
        "live": live,
        "iteration": question.iteration,
    }


def add_routes(instance) -> None:
    """GET and POST /treerpo/pick.

    ComfyUI itself turns requests from other sites away; a JSON body cannot come from a plain form either.
    """
    from aiohttp import web

    def refused(status: int, sentence: str):
        return web.json_response({"error": sentence}, status=status)

    @instance.routes.get("/treerpo/pick")
    async def waiting(request):
        return web.json_response({"questions": BROKER.questions()})

    @instance.routes.post("/treerpo/pick")
    async def picked(request):
        if (
            request.content_type != "application/json"
            or request.content_length is None
            or request.content_length > LARGEST
        ):
            return refused(400, f"Send the pick as application/json of at most {LARGEST} bytes.")
        try:
            body = json.loads(await request.read())
            name, text = body["id"], body["answer"]
        except web.HTTPException:  # a status of its own, such as too large once it is unpacked
            raise
        except Exception:  # what a body can be wrong in is aiohttp's and json's: packing, encoding, nesting, types
            name = text = None
        if not (isinstance(name, str) and isinstance(text, str)):
            return refused(400, 'Send the pick as JSON with two texts, such as {"id": "a1b2c3d4e5", "answer": "3"}.')
        try:
            asked = BROKER.answer(name, text)
        except LookupError as error:
            return refused(404, error.args[0])
        except ValueError as error:
            return refused(400, str(error))
        while not asked.settled.is_set():  # a pick that is said to be taken is in the book: no kill loses it
            await asyncio.sleep(TAKEN)
        return web.json_response({"ok": True}) if asked.kept else refused(404, nobody_waits(name))


if browser.server() is not None:
    add_routes(browser.server())


def book(policy) -> Picks:
    """Where the picks of this run are kept; without a policy those of all that has none."""
    return Picks(
        policy.run.folder if policy is not None else Path(folder_paths.get_output_directory()) / "treerpo" / "picks"
    )


def human(node_id, how: str, seconds: float, fallback, policy, replay: bool, show: int = 0) -> HumanReward:
    return HumanReward(
        lambda question: BROKER.ask(question, seconds, node_id),
        how,
        fallback=fallback,
        picks=book(policy),
        replay=replay,
        show=show,
        iteration=lambda: policy.run.iteration if policy is not None else None,
    )


# Inputs that both nodes share.
_HOW = io.Combo.Input(
    "how",
    options=list(HOW),
    default="best",
    tooltip="What you are asked for. best: one click per prompt. best and worst: two. ranking: the most work, and the "
    "most to learn from.",
)
_POLICY = PolicySocket.Input(
    "policy",
    optional=True,
    tooltip="Connect the policy to keep the picks in its run's folder; else they are in output/treerpo/picks.",
)
_FALLBACK = RewardSocket.Input(
    "fallback",
    optional=True,
    tooltip="An automatic reward that decides when you do not: after the time-out, and where you have no opinion.",
)
_SECONDS = (
    "Seconds to wait for you. Higher = more time to choose; after that the fallback decides, or the prompt's images "
    "train nothing. 0 = wait for ever."
)
_REPLAY = expert(
    io.Boolean.Input(
        "replay",
        default=True,
        optional=True,
        tooltip="Images that you have answered for are not asked about again, such as after a crash. Off = always ask.",
    )
)


class HumanRewardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOHuman",
            "Human Reward",
            description="You are the reward: the run waits and asks which image of each prompt is the best. For the "
            "TreeRPO Trainer, Score Images and Combine Rewards.",
            search_aliases=["human feedback", "rlhf", "preference", "pick winner", "choose best"],
            inputs=[
                _HOW,
                io.Int.Input("seconds", default=0, min=0, max=604800, tooltip=_SECONDS),
                _FALLBACK,
                _POLICY,
                _REPLAY,
                expert(
                    io.Int.Input(
                        "show",
                        default=0,
                        min=0,
                        max=4096,
                        optional=True,
                        tooltip="At most so many images of a prompt are shown. Lower = easier to choose; the others "
                        "get no score. With a fallback, its best and its worst ones. 0 = all.",
                    )
                ),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, how, seconds, fallback=None, policy=None, replay=True, show=0) -> io.NodeOutput:
        return io.NodeOutput(human(cls.hidden.unique_id, how, seconds, fallback, policy, replay, show))


@dataclass
class Group:
    """The images of one prompt, and what was decided about them."""

    prompt: str
    images: list  # of [H, W, 3] in 0..1
    about: dict  # core.rewards.picks.described
    scores: torch.Tensor | None = None
    answer: Answer | None = None


class PickWinnerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPick",
            "Pick the Winner",
            description="You choose the best image of each prompt, and that is the reward: for Tree Advantages, or "
            "for any images without training. Either the run waits for you, or it ends here, you choose, and the next "
            "run goes on.",
            search_aliases=["human feedback", "rlhf", "preference", "choose best", "rank images", "image picker"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The decoded leaves of Tree Sampler, or any images."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt, line breaks and all. From Tree Prompts: several prompts, and the images are "
                    "taken in equal parts, in order. From Image Folder: one per image.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["two runs", "live"],
                    default="two runs",
                    tooltip="two runs: the first run shows the images and stops here; write or click your picks and "
                    "queue again. live: the run waits.",
                ),
                _HOW,
                io.String.Input(
                    "picks",
                    multiline=True,
                    default="",
                    tooltip="For two runs: one line per prompt. 3 = image 3 is the best; 3 / 7 = best / worst; 3 > 1 "
                    "= 2 > 7 = a ranking; - = no opinion. A line may begin with the group's id, such as a1b2c3d4e5: "
                    "3.",
                ),
                _FALLBACK,
                _POLICY,
                io.Int.Input("seconds", default=0, min=0, max=604800, optional=True, tooltip=f"For live. {_SECONDS}"),
                _REPLAY,
            ],
            outputs=[
                ScoresSocket.Output(display_name="rewards"),
                io.Image.Output(display_name="best", is_output_list=True, tooltip="The best image of each prompt."),
                io.Image.Output(
                    display_name="sheet", tooltip="All images with their numbers; the picked ones are framed."
                ),
                io.String.Output(display_name="table"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return float("nan")  # a new NaN each time: what it waits for is on the disk

    @classmethod
    def execute(
        cls, images, prompts, mode, how, picks, fallback=(None,), policy=(None,), seconds=(0,), replay=(True,)
    ) -> io.NodeOutput:
        with torch.inference_mode(False), torch.no_grad():
            every = [image.clone() for batch in images for image in batch]
            reward = human(cls.hidden.unique_id, how[0], seconds[0], fallback[0], policy[0], replay[0])
            groups = grouped(every, prompts, [len(batch) for batch in images], reward.iteration())
            if mode[0] == "live":
                for number, group in enumerate(groups, 1):
                    group.scores, group.answer = reward.choose(
                        together(group.images), group.prompt, number, len(groups)
                    )
                status = ""
            else:
                status = from_widget(groups, picks[0], reward, cls.hidden.unique_id)
            if not status and not any(group.scores.isfinite().any() for group in groups):
                status = (
                    "Nothing was picked and there is no fallback reward, so nothing goes on from here. For other "
                    "images change the seed; to train on these, pick one."
                )
            sheet = stacked_sheets(groups)
        blocked = ExecutionBlocker(None)
        if status:
            outputs, text = (blocked, blocked), "\n".join(filter(None, [note_on(prompts), status]))
        else:
            found = Scored(
                {reward.name: torch.cat([group.scores for group in groups])},
                {reward.name: 1.0},
                None,
                [group.prompt for group in groups for _ in group.images],
                together(every),
            )
            outputs = (
                found,
                [
                    group.images[int(group.scores.nan_to_num(float("-inf")).argmax())][None]
                    for group in groups
                    if group.scores.isfinite().any()
                ],
            )
            text = table(
                found.values,
                found.prompts,
                [
                    f"group {number}, image {i + 1}"
                    for number, group in enumerate(groups, 1)
                    for i in range(len(group.images))
                ],
            )
        return io.NodeOutput(*outputs, sheet, text, ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), "text": (text,)})


def grouped(images: list, texts: list[str], batches: list[int], iteration: int | None) -> list[Group]:
    """The images of each prompt: equal parts by the prompts of one text, or, with several texts, neighbours of the same
    prompt.
    """
    per_image = share(texts, batches)
    several = len(texts) == 1 and isinstance(texts[0], PromptText)
    size = len(images) // (len(texts[0].prompts) if several else 1)
    edges = [i for i in range(len(images)) if i % size == 0 or per_image[i] != per_image[i - 1]] + [len(images)]
    parts = [(per_image[first], images[first:last]) for first, last in zip(edges, edges[1:])]
    return [Group(prompt, part, described(prompt, part, iteration)) for prompt, part in parts]


def together(images: list):
    """As one tensor where they have one size."""
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def from_widget(groups: list[Group], text: str, reward: HumanReward, node_id) -> str:
    """Give the groups the scores that the widget's text says. Where it does not yet, show them and say what to do: that
    text, else "".

    What stood there when the images were first shown was meant for others before them: of that, only lines with the id
    of a group count.
    """
    folder, node, now = reward.picks.folder, str(node_id), datetime.now(timezone.utc)
    record = load_waiting(folder, node)
    shown = record is not None and fits(record, groups)
    if shown:
        for group, known in zip(groups, record["groups"]):
            group.about = known  # with the id that the person saw
    ids = [group.about["id"] for group in groups]
    plain = [answer for name, answer in lines_of(text) if name is None]
    changed = record is not None and plain != record["plain"]
    found = picks_for(text, ids, [len(group.images) for group in groups], unnamed=shown and changed)
    note = ""
    if changed and not shown and not record["answered"]:
        note = (
            "These are not the images that were shown to you (the seed, the model or a setting has changed), so your "
            "picks were not used."
        )
    elif plain and not (shown and changed):
        note = (
            "What stands in picks was there before these images: if you mean the same again, write the id in front of "
            "it."
        )
    if not shown:
        record = {
            "plain": plain,
            "when": now.isoformat(timespec="seconds"),
            "answered": False,
            "groups": [group.about for group in groups],
        }
    record["answered"] = record["answered"] or None not in found
    save_waiting(folder, node, record)
    if None in found:
        for number, (group, pick) in enumerate(zip(groups, found), 1):
            group.answer = pick[1] if pick is not None else None
            if pick is None:
                question = Question(
                    group.about["id"], group.prompt, reward.how, group.images, reward.iteration(), number, len(groups)
                )
                browser.send("treerpo.pick", shown_to_browser(question, node_id, live=False))
        return request(groups, found, note)
    seconds = (now - datetime.fromisoformat(record["when"])).total_seconds()
    for group, (words, group.answer) in zip(groups, found):
        group.scores = (
            choice_scores([group.answer])
            if group.answer is not None
            else reward.automatic(together(group.images), group.prompt)
        )
        known = reward.picks.find(group.about)
        if known is None or known["answer"] != words:
            reward.picks.add(
                group.about,
                group.images,
                how=reward.how,
                answer=words,
                levels=group.answer.levels if group.answer else (),
                by="person" if group.answer else "skip",
                seconds=seconds,
            )
    return ""


def fits(record: dict, groups: list[Group]) -> bool:
    """Whether these are the images that were shown. Nearly the same ones may be those after an update, unless the
    iteration or a missing answer says otherwise.
    """
    return len(record["groups"]) == len(groups) and all(
        same_group(known, group.about, near=not record["answered"] or group.about["iteration"] is not None)
        for known, group in zip(record["groups"], groups)
    )


def request(groups: list[Group], found: list, note: str) -> str:
    """What the person has to do, in the node's text."""
    missing = [(number, group) for number, (group, pick) in enumerate(zip(groups, found), 1) if pick is None]
    lines = [
        "Waiting for your pick."
        if len(missing) == len(groups)
        else f"Waiting: {len(missing)} of {len(groups)} prompts still have no pick."
    ]
    lines += [
        f"Group {number}, id {group.about['id']}: {len(group.images)} images for '{one_line(group.prompt)}'"
        for number, group in missing
    ]
    lines.append(
        f"Write one line per prompt into picks, such as {missing[0][1].about['id']}: 1 (the number of the best image), "
        "and queue again."
    )
    return "\n".join([note, *lines] if note else lines)


def stacked_sheets(groups: list[Group]) -> torch.Tensor:
    """The numbered images of all groups, one below the other: [1, H, W, 3]."""
    sheets = [
        plot.numbered_sheet(
            group.images,
            group.answer.levels if group.answer else (),
            f"{number}  {group.about['id']}  {group.prompt}",
            256,
            enlarge=True,
            theme=DARK,
        )[0]
        for number, group in enumerate(groups, 1)
    ]
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole, top = Image.new("RGB", size, DARK.paper), 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return plot.to_tensor(whole)
