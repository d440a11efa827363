"""run.py, environments.py and headless.py: finding ComfyUI, environments, the HTTP and websocket client, messages; no
network needed.
"""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import environments
import headless
import run


def make_comfyui(folder):
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, seen by run.py instead of the user's."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(folder / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "elsewhere" / "run.py"))
    return folder


# ---------------------------------------------------------------- finding ComfyUI


def test_discovery_order(home, tmp_path, monkeypatch):
    """Each place is found, and every place added here wins over all places before it."""
    assert run.find_comfyui() is None
    assert run.find_comfyui() != make_comfyui(tmp_path / "unrelated")
    cached = make_comfyui(environments.cache_dir() / "ComfyUI")
    assert run.find_comfyui() == cached
    default = make_comfyui(home / "comfy" / "ComfyUI")
    assert run.find_comfyui() == default

    config = environments.comfy_cli_config(home)
    config.parent.mkdir(parents=True)
    recent, chosen = make_comfyui(tmp_path / "recent"), make_comfyui(tmp_path / "chosen % 1")
    config.write_text(f"[DEFAULT]\nrecent_workspace = {recent}\n")
    assert run.find_comfyui() == recent
    config.write_text(f"[DEFAULT]\nrecent_workspace = {recent}\ndefault_workspace = {chosen}\n")
    assert run.find_comfyui() == chosen

    around = make_comfyui(tmp_path / "around")
    monkeypatch.setattr(run, "__file__", str(around / "custom_nodes" / "TreeRPO" / "run.py"))
    assert run.find_comfyui() == around
    named = make_comfyui(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert run.find_comfyui() == named
    given = make_comfyui(tmp_path / "given")
    assert run.find_comfyui(given) == given


def test_a_broken_comfy_cli_config_is_ignored(home):
    config = environments.comfy_cli_config(home)
    config.parent.mkdir(parents=True)
    config.write_text("recent_workspace = x\n[[[")
    assert run.find_comfyui() is None


def test_a_custom_nodes_folder_of_something_else_is_not_comfyui(home, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "data" / "custom_nodes" / "TreeRPO" / "run.py"))
    assert run.find_comfyui() is None


@pytest.mark.parametrize("source", ["--comfyui", "COMFYUI_PATH"])
def test_a_named_path_must_be_comfyui(home, tmp_path, monkeypatch, source):
    if source == "COMFYUI_PATH":
        monkeypatch.setenv(source, str(tmp_path))
    with pytest.raises(run.Problem, match=f"{source} names .* is not ComfyUI") as caught:
        run.find_comfyui(tmp_path if source == "--comfyui" else None)
    assert "\n" not in str(caught.value)


def test_older_checkouts_are_the_siblings(tmp_path):
    main = make_comfyui(tmp_path / "ComfyUI")
    older = [make_comfyui(tmp_path / f"ComfyUI-{version}") for version in ("0.3.64", "0.9.0")]
    (tmp_path / "ComfyUI-notes").mkdir()
    assert run.older_comfyuis(main) == older
    assert run.older_comfyuis(older[0]) == older[1:]
    assert run.older_comfyuis(None) == []


# ---------------------------------------------------------------- the environment


@pytest.fixture
def builds(home, monkeypatch):
    """Replace the slow steps of build_env by fakes; the list of what pip was asked for."""
    asked = []

    def venv(folder):
        environments.env_python(folder).parent.mkdir(parents=True)
        environments.env_python(folder).touch()

    def pip(python, requirements):
        time.sleep(0.2)
        asked.append(requirements)

    monkeypatch.setattr(environments, "make_venv", venv)
    monkeypatch.setattr(environments, "pip_install", pip)
    return asked


def test_an_environment_is_made_once(builds, tmp_path):
    folder = tmp_path / "cache" / "env-1"
    assert environments.build_env(folder, ["a"], "things") == environments.env_python(folder)
    assert environments.build_env(folder, ["a"], "things") == environments.env_python(folder)
    assert builds == [["a"]]


def test_a_half_made_environment_is_made_anew(builds, tmp_path, monkeypatch):
    folder = tmp_path / "env-1"
    fake_pip = environments.pip_install

    def broken_pip(python, requirements):
        (folder / "rubbish").touch()
        raise run.Problem("pip could not")

    monkeypatch.setattr(environments, "pip_install", broken_pip)
    with pytest.raises(run.Problem):
        environments.build_env(folder, ["a"], "things")
    monkeypatch.setattr(environments, "pip_install", fake_pip)
    environments.build_env(folder, ["a"], "things")
    assert builds == [["a"]] and not (folder / "rubbish").exists()


def test_two_runs_do_not_make_the_same_environment_at_once(builds, tmp_path):
    threads = [
        threading.Thread(target=environments.build_env, args=(tmp_path / "env-1", ["a"], "things")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert builds == [["a"]]


def test_the_environment_depends_on_comfyuis_requirements(builds, tmp_path):
    comfyui = make_comfyui(tmp_path / "ComfyUI")
    pythons = [run.ensure_env(None)]
    for text in ("torch\n", "torch\nnew\n", "torch\n"):
        (comfyui / "requirements.txt").write_text(text)
        pythons.append(run.ensure_env(comfyui))
    assert pythons[1] == pythons[3] and len(set(pythons)) == 3 and len(builds) == 3
    assert builds[1] == ["-r", str(run.REPO / "tests" / "requirements.txt"), "-r", str(comfyui / "requirements.txt")]


def test_torch_and_its_companions_are_pinned_together():
    pins = (run.REPO / "tests" / "requirements.txt").read_text("utf-8").splitlines()
    assert {"torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"} <= set(pins)


def test_a_failing_pip_is_one_sentence(home, tmp_path):
    pytest.importorskip("pip")
    with pytest.raises(run.Problem) as caught:
        environments.pip_install(sys.executable, ["--no-index", "no-such-package-of-treerpo"])
    assert "no-such-package-of-treerpo" in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_packages_do_not_leak_in(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert "PYTHONPATH" not in run.environment() and run.environment(A=1)["A"] == "1"


def test_a_process_is_ended_with_its_children(tmp_path):
    child = "import time; time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); "
        "p.wait()"
    )
    with environments.spawned([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
    assert process.returncode is not None
    if os.name != "nt":
        for _ in range(50):
            state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
            if not state or state.startswith("Z"):
                return
            time.sleep(0.1)
        pytest.fail("the child lives on")


# ---------------------------------------------------------------- websocket


def frame(opcode, payload, final=True, mask=None):
    head = bytes([(0x80 if final else 0) | opcode])
    bit, size = 0x80 if mask else 0, len(payload)
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([bit | 127]) + size.to_bytes(8, "big")
    return head + (mask + headless.apply_mask(payload, mask) if mask else payload)


@pytest.mark.parametrize("mask", [None, b"\x01\xff\x80\x7f"])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536])
def test_frames_of_every_size(size, mask):
    payload = os.urandom(size)
    data = frame(1, payload, mask=mask)
    assert headless.parse_frame(data + b"next") == (True, 1, payload, len(data))
    for cut in {0, 1, 2, 3, 5, 9, 13, len(data) - 1}:
        if cut < len(data):
            assert headless.parse_frame(data[:cut]) is None


def test_the_example_frames_of_rfc_6455():
    assert headless.parse_frame(bytes.fromhex("810548656c6c6f")) == (True, 1, b"Hello", 7)
    assert headless.parse_frame(bytes.fromhex("818537fa213d7f9f4d5158")) == (True, 1, b"Hello", 11)
    assert headless.parse_frame(bytes.fromhex("010348656c")) == (False, 1, b"Hel", 5)


def speak(frames, heard, accept=True):
    """A websocket server for one visitor: shake hands, send the given bytes piecemeal, keep what is said. Its url."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        visitor, _ = listener.accept()
        request = b""
        while b"\r\n\r\n" not in request:
            request += visitor.recv(4096)
        key = request.split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]
        answer = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        visitor.sendall(
            b"HTTP/1.1 101 Switching\r\nSec-WebSocket-Accept: "
            + (answer if accept else b"wrong")
            + b"\r\n\r\n"
            + frames[:1]
        )
        for part in (frames[1:4], frames[4:]):
            time.sleep(0.05)
            visitor.sendall(part)
        visitor.settimeout(2)
        try:
            heard.append(visitor.recv(4096))
        except OSError:
            pass
        visitor.close()
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/ws?clientId=x"


def test_websocket_messages():
    heard = []
    frames = (
        frame(1, b'{"a": ', final=False)
        + frame(9, b"hi")
        + frame(0, b"1}")
        + frame(2, b"preview" * 100)
        + frame(1, b'{"b": 2}')
    )
    visitor = headless.WebSocket(speak(frames + frame(8, b""), heard))
    assert visitor.receive(5) == {"a": 1}
    assert visitor.receive(5) == {"b": 2}
    with pytest.raises(ConnectionError):
        visitor.receive(5)
    deadline = time.monotonic() + 5
    while not heard and time.monotonic() < deadline:
        time.sleep(0.02)
    assert headless.parse_frame(heard[0])[:3] == (True, 10, b"hi") and heard[0][1] & 0x80, (
        "the pong repeats the ping, masked"
    )
    visitor.close()


def test_websocket_silence_and_refusal():
    visitor = headless.WebSocket(speak(b"\x81", []))
    assert visitor.receive(0.2) is None
    visitor.close()
    with pytest.raises(ConnectionError):
        headless.WebSocket(speak(b"", [], accept=False))


def test_nobody_answers():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(headless.Unreachable, match="No ComfyUI answers at"):
            run.Client(url).queue({})


# ---------------------------------------------------------------- graphs and messages


def graph():
    return {
        "1": {
            "class_type": "KSampler",
            "inputs": {"seed": 1, "cfg": 3.5, "model": ["2", 0]},
            "_meta": {"title": "Draw v1.5"},
        },
        "2": {"class_type": "Load", "inputs": {"name": "a", "mode": "x", "mode.width": 4}},
        "3": {"class_type": "Save", "inputs": {"prefix": "p"}},
        "4": {"class_type": "Save", "inputs": {"prefix": "q"}},
    }


@pytest.mark.parametrize(
    "setting, node, name, value",
    [
        ("1.seed=7", "1", "seed", 7),
        ("KSampler.cfg=1e-2", "1", "cfg", 0.01),
        ("Draw v1.5.cfg=2.5", "1", "cfg", 2.5),
        ("Load.name=123", "2", "name", "123"),
        ("Load.name=a=b.c", "2", "name", "a=b.c"),
        ("Load.mode.width=8", "2", "mode.width", 8),
        ('KSampler.model=["4", 1]', "1", "model", ["4", 1]),
        ("4.prefix=", "4", "prefix", ""),
    ],
)
def test_settings(setting, node, name, value):
    changed = graph()
    run.apply_setting(changed, setting)
    expected = graph()
    expected[node]["inputs"][name] = value
    assert changed == expected


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("seed=7", "not of the form"),
        ("1.seed", "not of the form"),
        ("Nobody.seed=7", "no node 'Nobody'; it has Draw v1.5, Load, Save"),
        ("1.sead=7", "no input 'sead'; it has seed, cfg, model"),
        ("Save.prefix=x", r"several nodes .* \(3, 4\)"),
    ],
)
def test_bad_settings(setting, sentence):
    with pytest.raises(run.Problem, match=sentence):
        run.apply_setting(graph(), setting)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "Cannot read"),
        ("{", "is not JSON"),
        ('{"nodes": [], "links": []}', "Export"),
        ('{"1": {"inputs": {}}}', "not a workflow"),
        ("[1]", "not a workflow"),
    ],
)
def test_bad_workflow_files(tmp_path, capsys, text, sentence):
    file = tmp_path / "flow.json"
    if text is not None:
        file.write_text(text)
    assert run.main(["workflow", str(file)]) == 1
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.startswith("run.py: ") and shown.err.count("\n") == 1


def test_refusals_name_the_node():
    answer = {
        "error": {"message": "failed"},
        "node_errors": {"1": {"class_type": "KSampler", "errors": [{"message": "Too small", "details": "seed"}]}},
    }
    assert headless.explain(answer, graph()) == "ComfyUI refused the graph: node 'Draw v1.5' (1): Too small: seed"
    assert "Node 'X' not found" in headless.explain(
        {"error": {"message": "Node 'X' not found", "details": ""}, "node_errors": {}}, graph()
    )


def test_unknown_benchmark(capsys):
    assert run.main(["bench", "nonsense"]) == 1
    assert "no benchmark 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, mean", [("size: mean 0.2500, std 0.1", 0.25), (["a", "Mean score = -1.5e-3"], -0.0015), ("nothing", None)]
)
def test_mean_score(text, mean):
    assert run.mean_score(text) == mean


def test_the_skipped_line(tmp_path):
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_a(n): pytest.skip('no GPU')\n"
        "@pytest.mark.xfail\n"
        "def test_b(): assert False\n"
        "def test_c(): pass\n"
    )
    (tmp_path / "test_more.py").write_text("import pytest\npytest.skip('no model', allow_module_level=True)\n")
    report = tmp_path / "report.xml"

    def line(*arguments):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *arguments,
            str(tmp_path),
        ]
        subprocess.run(command, cwd=tmp_path, capture_output=True)
        return run.skipped_line(report)

    assert line() == "skipped: 3 (2 x no GPU; 1 x no model)"
    assert line("-k", "test_c", "--ignore", str(tmp_path / "test_more.py")) == "skipped: 0"
    assert run.skipped_line(tmp_path / "missing.xml").startswith("skipped: unknown")


# ---------------------------------------------------------------- a real ComfyUI

PACK = '''
import json, os, time
import folder_paths
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

class Slow:
    """Counts slowly; may fail."""
    INPUT_TYPES = classmethod(lambda s: {"required": {"steps": ("INT", {"min": 1}), "fail": ("BOOLEAN", {})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "go", True
    def go(self, steps, fail):
        bar = ProgressBar(steps)
        for _ in range(steps):
            throw_exception_if_processing_interrupted()
            time.sleep(0.05)
            bar.update(1)
        if fail:
            raise ValueError("the reward is NaN")
        return {"ui": {"text": ["size: mean 0.2500, std 0.1"]}}

class Update:
    """Stands in for a training: writes what the Trainer and Save write."""
    INPUT_TYPES = classmethod(lambda s: {"required": {name: (kind, {}) for name, kind in
        {"model": "STRING", "run_name": "STRING", "seed": "INT", "lora_name": "STRING", "text": "STRING",
          "held_out": "FLOAT", "iterations": "INT", "evaluate_every": "INT"}.items()}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "go", True
    IS_CHANGED = classmethod(lambda s, **_: float("nan"))
    def go(self, run_name, lora_name, iterations, **_):
        run = os.path.join(folder_paths.get_output_directory(), "treerpo", run_name)
        os.makedirs(run, exist_ok=True)
        metrics = os.path.join(run, "metrics.jsonl")
        with open(metrics, "w") as file:
            for n in range(iterations):
                row = {"iteration": n, "reward": 0.1 * (n + 1), "reward_std": 0.01, "forwards": 24, "seconds": 0.5}
                file.write(json.dumps(row) + "\\n")
        loras = os.path.join(folder_paths.models_dir, "loras")
        for path in (os.path.join(run, "tree.png"), os.path.join(loras, lora_name + ".safetensors")):
            open(path, "wb").close()
        return {}

NODE_CLASS_MAPPINGS = {"Slow": Slow, "Update": Update}
'''


@pytest.fixture(scope="module")
def comfyui():
    found = run.find_comfyui()
    if found is None:
        pytest.skip("ComfyUI not found: set COMFYUI_PATH")
    return found


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "__init__.py").write_text(PACK)
    return folder


@pytest.fixture(scope="module")
def server(comfyui, pack):
    with run.Server(comfyui, sys.executable, pack=pack) as started:
        yield started
    assert started.process.returncode is not None and not started.base.exists()


def picture_graph(steps=4, fail=False):
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 2, "color": 255}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "sub/x"},
            "_meta": {"title": "Before"},
        },
        "3": {"class_type": "Slow", "inputs": {"steps": steps, "fail": fail}, "_meta": {"title": "Count"}},
    }


def test_round_trip(server, tmp_path):
    client, seen = run.Client(server.url), []
    assert "EmptyImage" in client.object_info()
    outputs = client.run(picture_graph(), lambda *news: seen.append(news))
    assert client.socket is not None and ("Count", 4, 4) in seen
    files = [client.download(image, tmp_path) for image in outputs["2"]["images"]]
    assert len(files) == 2 and all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert outputs["3"] == {"text": ["size: mean 0.2500, std 0.1"]}
    client.free()


def test_round_trip_without_a_websocket(server, monkeypatch):
    client = run.Client(server.url)
    monkeypatch.setattr(client, "_listen", lambda: None)
    assert "2" in client.run(picture_graph(steps=5))


def test_a_lost_websocket_is_survived(server):
    client = run.Client(server.url)
    prompt_id = client.queue(picture_graph(steps=21))
    client.socket.socket.shutdown(socket.SHUT_RDWR)
    assert "3" in client.wait(prompt_id)
    assert client.socket is None


def test_errors_are_sentences(server):
    client = run.Client(server.url)
    with pytest.raises(run.ExecutionError, match=r"^node 'Count' \(3\) failed: the reward is NaN$"):
        client.run(picture_graph(fail=True))
    with pytest.raises(headless.PromptRejected, match=r"node 'Count' \(3\): .*steps") as caught:
        client.run(picture_graph(steps=0))
    assert list(caught.value.node_errors) == ["3"]
    unknown = picture_graph()
    unknown["3"]["class_type"] = "NoSuchNode"
    with pytest.raises(headless.PromptRejected, match="NoSuchNode|Count"):
        client.run(unknown)
    assert "2" in client.run(picture_graph()), "the server works on"


def test_interrupt(server):
    client = run.Client(server.url)
    prompt_id = client.queue(picture_graph(steps=400))
    threading.Timer(0.5, client.interrupt).start()
    with pytest.raises(run.Problem, match="interrupted at node 'Count'"):
        client.wait(prompt_id)


def test_the_workflow_command(server, tmp_path, capsys):
    file = tmp_path / "flow.json"
    file.write_text(json.dumps(picture_graph()))
    arguments = ["workflow", str(file), "--server", server.url, "--out", str(tmp_path / "out")]
    assert run.main([*arguments, "--set", "EmptyImage.width=16", "--set", "Count.steps=1"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 and "Count: size: mean" in capsys.readouterr().out
    assert run.main([*arguments, "--set", "Count.fail=true"]) == 1
    assert "the reward is NaN" in capsys.readouterr().err


def test_the_demo_command(comfyui, pack, tmp_path, capsys, monkeypatch):
    """The whole demo with stand-in graphs: what is set, printed and left behind."""
    flows = tmp_path / "repo" / "workflows" / "api"
    flows.mkdir(parents=True)
    (tmp_path / "repo" / "__init__.py").write_text(PACK)
    inputs = {"model": "flux", "run_name": "r", "seed": 5, "lora_name": "l"}
    inputs |= {"text": "a", "held_out": 8.0, "iterations": 1, "evaluate_every": 1}
    (flows / "trainer.json").write_text(
        json.dumps({"1": {"class_type": "Update", "inputs": inputs, "_meta": {"title": "Trainer"}}})
    )
    prompts = {"class_type": "Prompts", "inputs": {"text": "of first_steps"}, "_meta": {"title": "Prompts"}}
    (flows / "first_steps.json").write_text(json.dumps({"1": prompts}))
    compare = picture_graph(steps=1)
    compare["4"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": "y"},
        "_meta": {"title": "After"},
    }
    compare["3"]["_meta"]["title"] = "Score before"
    compare["5"] = {"class_type": "Slow", "inputs": {"steps": 1, "fail": False}, "_meta": {"title": "Score after"}}
    (flows / "compare.json").write_text(json.dumps(compare))
    done = []

    def set_input(graph, *setting):  # one node stands for all that the real graph has
        done.append(setting)
        graph["1"]["inputs"][setting[1]] = setting[2]

    monkeypatch.setattr(run, "REPO", tmp_path / "repo")
    monkeypatch.setattr(run, "ensure_env", lambda comfyui: sys.executable)
    monkeypatch.setattr(run, "set_input", set_input)
    monkeypatch.setattr(run, "figures", lambda *_: {"taste": {"before": 0.1, "after": 0.9}})
    out = tmp_path / "out"
    assert (
        run.main(
            [
                "demo",
                "--comfyui",
                str(comfyui),
                "--model",
                "sd3",
                "--iterations",
                "12",
                "--out",
                str(out),
                "--seed",
                "9",
            ]
        )
        == 0
    )
    name = "treerpo_demo_sd3"
    assert done[:8] == [
        ("Model", "model", "sd3"),
        ("Policy", "run_name", name),
        ("Prompts", "text", "of first_steps"),
        ("Prompts", "held_out", 0.0),
        ("Trainer", "iterations", 12),
        ("Trainer", "seed", 9),
        ("Trainer", "evaluate_every", 0),
        ("Save", "lora_name", name),
    ]
    assert done[8:] == [("Model", "model", "sd3"), ("LoRA", "lora_name", f"{name}.safetensors")]
    left = {
        "metrics.jsonl",
        "tree.png",
        "before_1.png",
        "before_2.png",
        "after_1.png",
        "after_2.png",
        f"{name}.safetensors",
        "summary.json",
    }
    assert {path.name for path in out.iterdir()} == left
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["iterations"] == 12
        and summary["taste"] == {"before": 0.1, "after": 0.9}
        and summary["reward_first"] == pytest.approx(0.25)
        and summary["reward_last"] == pytest.approx(1.05)
        and summary["held_out"] == {"before": 0.25, "after": 0.25}
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("iteration  10/12") for line in lines) == 1 and "24 forwards" in "".join(lines)


def test_a_server_that_cannot_start_says_why(comfyui):
    with pytest.raises(run.Problem, match="(?s)could not start.*--no-such-option"):
        with run.Server(comfyui, sys.executable, pack=None, args=["--no-such-option"]):
            pass


def test_a_server_that_dies_says_so(comfyui):
    with pytest.raises(run.Problem, match="ended in mid-work"):
        with run.Server(comfyui, sys.executable, pack=None) as server:
            threading.Timer(0.3, server.process.kill).start()
            while True:
                run.Client(server.url).get("/queue")


def test_the_pack_is_linked_not_copied(tmp_path):
    source, link = tmp_path / "source", tmp_path / "base" / "TreeRPO"
    source.mkdir()
    (source / "a.py").touch()
    link.parent.mkdir()
    for _ in range(2):  # a kept base directory has the link already
        headless.link_folder(source, link)
    assert (link / "a.py").is_file() and (os.name == "nt" or Path(os.readlink(link)) == source)


NODES = {"1": {"class_type": "TreeRPOTinyModel", "inputs": {"model": "flux"}}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("wrapped", [NODES, {"prompt": NODES}, {"client_id": "x", "prompt": NODES, "extra_data": {}}])
def test_a_workflow_loads_as_editors_and_clients_write_it(tmp_path, encoding, wrapped):
    (tmp_path / "flow.json").write_bytes(json.dumps(wrapped).encode(encoding))
    assert headless.load_graph(tmp_path / "flow.json") == NODES


def test_a_node_may_have_the_id_prompt(tmp_path):
    (tmp_path / "flow.json").write_text(json.dumps({"prompt": NODES["1"]}))
    assert headless.load_graph(tmp_path / "flow.json") == {"prompt": NODES["1"]}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[" * 100000, "nested too deeply"),
        ('{"1": {"class_type": "A"}}', "not a workflow in ComfyUI's API format"),
        ('{"prompt": "a cat"}', "not a workflow in ComfyUI's API format"),
        ('{"prompt": {"nodes": [], "links": []}}', "is an editor workflow"),
        ("\xff\xfe", "is not JSON"),
    ],
)
def test_what_is_no_workflow_is_said(tmp_path, text, sentence):
    (tmp_path / "flow.json").write_text(text, "utf-8")
    with pytest.raises(run.Problem, match=sentence):
        headless.load_graph(tmp_path / "flow.json")
