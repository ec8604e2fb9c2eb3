"""Messages carry text of others, which must neither break what shows them nor look like lines of ours."""

import json
import pickle

import pytest
from comfyui_gcfg.gcfg.errors import GuidanceError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\ud83d", "a\\ud83d"),
        ("\ud83d\ude00", "\\ud83d\\ude00"),  # two halves that were never joined
        ("red\x1b[31m", "red\\x1b[31m"),
        ("one\nINFO two\r\t", "one\\nINFO two\\r\\t"),
        ("\x00\x7f\x85\u2028\u202e", "\\x00\\x7f\\x85\\u2028\\u202e"),
        ("7.5 · 向日葵 👩‍🎨 é", "7.5 · 向日葵 👩‍🎨 é"),
    ],
)
def test_text_of_others_stays_on_its_line(text, shown):
    assert printable(text) == shown
    error = GuidanceError(f"Guidance Term '{text}': no.")
    assert str(error) == f"Guidance Term '{shown}': no."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert json.loads(json.dumps(str(error)).encode()) == str(error)
    str(error).encode()
