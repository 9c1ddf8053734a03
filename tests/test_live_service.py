"""A served creature: a tick over the socket is a tick, and no frame takes the server down. The client is the page's."""

import json
import re
import socket
import struct
import sys
import threading

import numpy as np
import pytest
import torch
from creatures import GPT2, load_script, micro_model

from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from creature.live import LiveCreature
from creature.live.frames import DTYPES, LONGEST_ARRAYS, LONGEST_HEADER, pack, unpack
from creature.live.perception import CONTACT_NOW, LARGEST
from creature.live.service import EMITTED, MOST_LEAVING, REQUESTS, SENSES, Service
from creature.settings import PROJECT
from processing_creature import CreatureProcessor

PAGE = (PROJECT / "docs" / "live.md").read_text(encoding="utf-8")
SIZES = {
    **GPT2, "num_mel_bins": 8, "audio_frames_per_tick": 8, "sliding_window": 6, "body_state_size": 2,
    "body_state_mean": [7.0] * 2, "body_state_std": [3.0] * 2, "action_mean": [-1.0, 0.5], "action_std": [2.0, 0.25],
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return micro_model(**SIZES)


@pytest.fixture(scope="module")
def processor(model):
    return CreatureProcessor.from_config(model.config, load_tokenizer())


@pytest.fixture(scope="module")
def service(model, processor):
    service = Service(LiveCreature(model, processor), port=0, patience=60, report=lambda line: None)
    thread = threading.Thread(target=service.serve)
    thread.start()
    yield service
    service.close()
    thread.join(30)
    assert not thread.is_alive() and service.listener.fileno() == -1


@pytest.fixture(scope="module")
def client_class():
    """The client of the page, at most 40 lines of numpy."""
    (text,) = re.findall(r"^```python client\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(text.splitlines()) <= 40 and "creature." not in text
    names = {}
    exec(text, names)
    return names["Creature"]


@pytest.fixture
def client(service, client_class):
    client = client_class(*service.address)
    client.ask("reset", seed=0)
    yield client
    client.close()


@pytest.fixture(scope="module")
def senses():
    """A tick of every sense, as arrays."""
    draw = np.random.default_rng(0)
    numbers = {"state": (2,), "joint_positions": (3, 3), "joint_rotations": (2, 3, 4), "touch": (4, 7)}
    arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in numbers.items()}
    arrays["touch"][:, :2] = [[1, 0], [3, 2], [7, 5], [9, 1]]
    arrays["audio"] = (draw.standard_normal(1280) * 3000).astype(np.int16)
    arrays["images"] = draw.integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    return arrays


def connected(service):
    connection = socket.create_connection(service.address, timeout=60)
    return connection


def sent(service, data: bytes) -> list[dict]:
    """The headers of all frames that come back for bytes after which nothing more is sent."""
    with connected(service) as connection, connection.makefile("rb") as file:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answers = []
        while lengths := file.read(8):
            header, arrays = struct.unpack("<II", lengths)
            answers.append(json.loads(file.read(header)))
            file.read(arrays)
        return answers


def frame(header: dict | bytes, body: bytes = b"", lengths: tuple | None = None) -> bytes:
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<II", *(lengths or (len(header), len(body)))) + header + body


def is_sentence(answer: dict) -> bool:
    return answer["kind"] == "error" and re.fullmatch(r"[A-Z\"a-z].*[.!]", answer["message"]) is not None


# --- the same as a tick ----------------------------------------------------------------------------------------------


def test_a_tick_over_the_socket_is_a_tick(client, model, processor, senses):
    creature = LiveCreature(model, processor)
    touch = [dict(zip(CONTACT_NOW, contact, strict=True)) for contact in senses["touch"].tolist()]
    said = []
    for tick in range(9):
        given = {name: value for name, value in senses.items() if tick % 3 or name in ("audio", "images")}
        words = {0: ["the robot", "picks"], 1: None}.get(tick, [])
        emission = client.ask("tick", given, words=words)
        wanted = creature.tick(words=words, **(given | ({"touch": touch} if "touch" in given else {})))
        assert emission["kind"] == "emission" and emission["clock"]["ticks"] == tick + 1
        for name in ("tick", "thought", "said", "thought_id", "said_id"):
            assert emission[name] == getattr(wanted, name), name
        for name in EMITTED:
            assert (name in emission) == (getattr(wanted, name) is not None)
            if name in emission:
                np.testing.assert_array_equal(emission[name], getattr(wanted, name), err_msg=name)
        said.append(emission["said_id"])
    assert {"voice_codes", "rotations", "blend_shapes", "eyes", "action"} <= emission.keys() and len(set(said)) > 3
    assert client.ask("reset", seed=5)["seed"] == 5 == client.ask("reset")["seed"]


def test_hello_says_what_the_creature_has(client, model):
    hello = client.ask("hello")
    assert hello["cameras"] == 2 and hello["image_size"] == [8, 8] and hello["joints"] == 3 and hello["action"] == 2
    assert hello["sampling_rate"] == 16000 and hello["streams"] == list(model.streams.names) and hello["tick"] == 0
    assert all(f"`{name}`" in PAGE for name in hello if name != "kind")


def test_the_page_names_every_request_sense_and_limit():
    for name in [*REQUESTS, *SENSES, *EMITTED, *DTYPES]:
        assert f"`{name}`" in PAGE, name
    assert f"{LONGEST_HEADER:,}" in PAGE and f"{LONGEST_ARRAYS:,}" in PAGE
    header, arrays = {"kind": "x", "y": [1, "é"]}, {"a": np.arange(6.0).reshape(2, 3), "b": np.array([3])}
    packed = pack(header, arrays)
    sizes = struct.unpack("<II", packed[:8])
    entries, found = unpack(packed[8 : 8 + sizes[0]], packed[8 + sizes[0] :])
    assert entries == header and found["a"].dtype == np.float32 and found["b"].dtype == np.int32
    np.testing.assert_array_equal(found["a"], arrays["a"])


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_a_wrong_request_is_a_sentence_and_the_connection_goes_on(client, service, model, processor, senses):
    def asked(message, arrays=None, kind="tick", **entries):
        with pytest.raises(ValueError, match=message):
            client.ask(kind, arrays, **entries)

    ones = np.ones(1280, np.float32)
    asked("no request 'eval'", kind="eval")
    asked("A tick has no 'sound'", {"sound": ones})
    asked("A reset has no 'words'", kind="reset", words=[])
    for seed in (-1, 1 << 63, 0.5, "1", True):
        asked("whole number", kind="reset", seed=seed)
    for words in (5, [1], {"words": "x"}, ["\ud800"]):
        asked('"words" holds|"words" is', words=words)
    asked("audio is an array of int32", {"audio": np.ones(1280, np.int32)})
    asked("out of uint8", {"audio": np.ones(1280, np.float64)})
    asked("out of uint8", {"audio": np.array(["x"] * 9, object)})
    asked("not finite", {"audio": ones * np.nan})
    asked("beyond 1e", {"audio": ones * 1e30})
    asked("beyond 1e", senses | {"state": np.float32([1e38, 0])})
    asked("samples", {"audio": np.ones((2, 3, 4), np.float32)})
    for shape in ((8, 8, 3), (2, 8, 8, 4), (2, 0, 8, 3), ()):
        asked("cameras, height, width", {"images": np.zeros(shape, np.uint8)})
    asked("2 cameras", {"images": np.zeros((1, 8, 8, 3), np.uint8)})
    asked("give", senses | {"state": np.zeros(3, np.float32)})
    asked("give", {"joint_rotations": np.zeros((4, 3), np.float32)})
    asked("contacts, 7", {"touch": np.zeros((2, 6), np.float32)})
    asked("the point 10", {"touch": np.float32([[10, 0, 1, 0, 0, 0, 20]])})
    assert client.ask("hello")["tick"] == 0 == service.creature._past.get_seq_length()
    nan = {
        name: np.full_like(senses[name], np.nan) for name in ("state", "joint_positions", "joint_rotations", "touch")
    }
    client.ask("tick", nan)  # nothing was measured: absent
    most = {name: np.full_like(value, LARGEST) for name, value in senses.items() if value.dtype == np.float32}
    client.ask("tick", most | {"touch": senses["touch"], "audio": ones * LARGEST})
    step = client.ask("tick", senses)
    assert all(np.isfinite(step[name]).all() for name in ("rotations", "action", "eyes"))
    assert all(keys.isfinite().all() for keys in service.creature._past.cache.keys)


@pytest.mark.parametrize(
    "data",
    [
        frame(b""),
        frame(b"{"),
        frame(b"[" * 60_000),
        frame(b"\xff\xfe"),
        frame(b'"tick"'),
        frame({"kind": 3}),
        frame({"kind": "tick", "arrays": "audio"}),
        frame({"kind": "tick", "arrays": {"audio": 1}}),
        frame({"kind": "tick", "arrays": [["audio", "float32", [4]]]}),
        frame({"kind": "tick", "arrays": [["audio", "float32", [4]]]}, b"\0" * 20),
        frame({"kind": "tick", "arrays": [["audio", "float32", [-4]]]}, b"\0" * 16),
        frame({"kind": "tick", "arrays": [["audio", "float32", [2.0]]]}, b"\0" * 8),
        frame({"kind": "tick", "arrays": [["audio", "float32", [True]]]}, b"\0" * 4),
        frame({"kind": "tick", "arrays": [["audio", "float32", [1 << 24] * 8]]}),
        frame({"kind": "tick", "arrays": [["audio", "float32", [1]] * 2]}, b"\0" * 4),
        frame({"kind": "tick", "arrays": [["audio", "float32", [1]]] * 2}, b"\0" * 8),
        frame({"kind": "tick", "arrays": [["audio", "O", [1]]]}, b"\0" * 8),
        frame({"kind": "hello"}, b"\0" * 8),
    ],
)
def test_a_broken_frame_is_a_sentence_and_the_next_one_is_read(service, data):
    answers = sent(service, data + frame({"kind": "hello"}))
    assert is_sentence(answers[0]) and [answer["kind"] for answer in answers[1:]] == ["hello"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frame(b"", lengths=(LONGEST_HEADER + 1, 0)),
        frame(b"", lengths=(2, LONGEST_ARRAYS + 1)) + b"{}" + b"\0" * 200_000,
        frame({"kind": "hello"})[:5],
        frame({"kind": "hello"})[:-1],
        frame({"kind": "tick"}, b"\0" * 9)[:-1],
        frame({"kind": "hello"}, lengths=(8, 0))[:15],
    ],
)
def test_where_the_next_frame_is_not_known_the_connection_ends_with_a_sentence(service, data):
    answers = sent(service, data)
    assert len(answers) == 1 and is_sentence(answers[0])


def test_random_bytes_and_damaged_frames(service, client_class, model, processor, senses):
    draw = np.random.default_rng(1)
    good = pack({"kind": "tick", "words": ["look"]}, senses)
    for case in range(60):
        data = bytearray(draw.bytes(int(draw.integers(1, 300))) if case % 3 == 0 else good)
        if case % 3 == 1:  # of the lengths and the header
            for place in draw.integers(0, 400, int(draw.integers(1, 4))):
                data[place] = draw.integers(256)
        elif case % 3 == 2:
            del data[int(draw.integers(1, len(data))) :]
        answers = sent(service, bytes(data))
        assert answers and all(is_sentence(a) or a["kind"] in ("emission", "hello", "reset") for a in answers)
    client = client_class(*service.address)
    client.ask("reset", seed=0)
    emission, wanted = client.ask("tick", {"audio": senses["audio"]}), LiveCreature(model, processor)
    assert emission["thought_id"] == wanted.tick(audio=senses["audio"]).thought_id
    client.close()


# --- who is connected ------------------------------------------------------------------------------------------------


def test_one_world_at_a_time(service, client):
    for _ in range(MOST_LEAVING + 3):
        (answer,) = sent(service, frame({"kind": "hello"}))
        assert is_sentence(answer) and "Another world" in answer["message"]
    assert client.ask("hello")["kind"] == "hello"


def test_who_hangs_or_disappears_frees_the_place(service, client_class, monkeypatch):
    monkeypatch.setattr(service, "patience", 0.3)
    for begin in (b"", frame({"kind": "hello"})[:-3]):
        with connected(service) as connection, connection.makefile("rb") as file:
            connection.sendall(begin)
            assert b"No whole frame came for 0.3 s" in file.read()
    monkeypatch.setattr(service, "patience", 60)
    with connected(service) as connection:
        connection.sendall(pack({"kind": "hello"}))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes by a reset
    with connected(service) as connection:  # asks a lot and never reads an answer
        monkeypatch.setattr(service, "patience", 0.3)
        connection.settimeout(0.2)
        with pytest.raises(OSError):
            while True:
                connection.sendall(frame({"kind": "hello"}) * 1000)
    monkeypatch.setattr(service, "patience", 60)
    client = client_class(*service.address)
    assert client.ask("hello")["kind"] == "hello"
    client.close()


def test_a_failure_of_the_creature_is_a_sentence_and_a_reset_helps(service, client, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(service.creature, "tick", lambda **_: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(ValueError, match="The creature failed .*: send a reset"):
            client.ask("tick")
    assert "Traceback" in capsys.readouterr().err
    client.ask("reset")
    assert client.ask("tick")["tick"] == 0


def test_a_port_that_is_taken_is_a_sentence(service):
    with pytest.raises(UserError, match="cannot be used"):
        Service(service.creature, port=service.address[1])
    with pytest.raises(UserError, match="cannot be used"):
        Service(service.creature, port=99_999)


def test_the_command_serves_and_warns_of_an_open_address(model, processor, client_class, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    script, serve, found = load_script("live"), Service.serve, []

    def served(service):  # as with Ctrl+C, after one request
        thread = threading.Thread(target=serve, args=(service,))
        thread.start()
        client = client_class(*service.address)
        found.append(client.ask("hello"))
        client.close()
        service.close()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(Service, "serve", served)
    flags = ["live.py", "--checkpoint", str(tmp_path), "--device", "cpu", "--serve", "0"]
    for host, warns in (("127.0.0.1", False), ("0.0.0.0", True)):
        monkeypatch.setattr(sys, "argv", [*flags, "--host", host, "--sampling_rate", "44100"])
        script.main()
        printed = capsys.readouterr().out
        assert f"a creature is served at {host}:" in printed and printed.endswith("ended\n")
        assert ("anybody who reaches 0.0.0.0" in printed) == warns
    assert found[0]["sampling_rate"] == 44100 and len(found) == 2
