"""Names of files whose bytes are no UTF-8."""

from __future__ import annotations

import os

from experts.data.names import readable


def test_every_byte_of_a_name_is_shown():
    for byte in range(1, 256):
        name = bytes([99, byte, 46])
        shown = readable(os.fsdecode(name))
        assert shown.encode()
        assert shown == (name.decode() if byte < 128 else f"c\\x{byte:02x}.")


def test_text_is_left_as_it_is():
    assert readable("café 猫 \n") == "café 猫 \n"
    assert readable("\ud800") == "\\ud800"
