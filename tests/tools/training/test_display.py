"""What a run shows: lines in a file, one moving line on a terminal."""

import io

from hybrid_tools.training import display
from hybrid_tools.training.display import PlainDisplay, TerminalDisplay, console_display
from hybrid_tools.training.trainer import StepResult


def result(step):
    return StepResult(step, 5.0 - step / 10, 1.0, 0.0, 0.75, 1e-3, 0.0, 1.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_file_gets_the_first_and_the_last_step_and_few_between(monkeypatch):
    seconds = iter(range(0, 100, 4))
    monkeypatch.setattr(display.time, "monotonic", lambda: next(seconds) + 100.0)
    stream = io.StringIO()
    shown = PlainDisplay(stream)
    for step in range(1, 9):
        shown.step(result(step), 8, 1000.0)
    shown.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1 of 8: loss 4.900, zeros 75.0 %, 1000 tokens/s"
    assert lines[1] == "step 4 of 8: loss 4.871, zeros 75.0 %, 1000 tokens/s, 0:16 left"
    assert [line.split()[1] for line in lines] == ["1", "4", "7", "8"]
    assert "left" not in lines[-1]


def test_terminal_gets_one_line_that_moves_and_messages_above_it():
    stream = Terminal()
    shown = console_display(stream)
    assert isinstance(shown, TerminalDisplay)
    shown.say("before")
    for step in (1, 2, 3):
        shown.step(result(step), 3, 1234.0)
    shown.say("[red]held-out[/red] loss 4.2")
    shown.close()
    shown.close()
    text = stream.getvalue()
    assert text.startswith("before\n")
    assert "[red]held-out[/red] loss 4.2" in text  # a message is text, not markup
    assert "3/3" in text
    assert "1234 tokens/s" in text
