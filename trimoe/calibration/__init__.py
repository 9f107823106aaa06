"""Text in, statistics out; and by the names under which scripts import them, how text is read and drawn."""

from trimoe.text.samples import calibrate, read_text

__all__ = ["calibrate", "read_text"]
