"""The markdown of a run's description."""

from orchestrator.notes import TRIALS, note, table


def test_a_note_asks_answers_and_says_how_to_do_it_again():
    text = note("How large?", {"method": "cmr"}, "Best: 3.", "python -m orchestrator.sweep x", {"the report": "#/r"})
    assert [line[4:] for line in text.splitlines() if line.startswith("### ")] == ["What", "Result", "Again", "Look at"]
    assert "```\npython -m orchestrator.sweep x\n```" in text
    for part in ("How large?", "- method: cmr", "Best: 3.", "- [the report](#/r)"):
        assert part in text


def test_a_table_of_markdown_has_short_names_and_whole_cells():
    lines = table(
        ["trial", "method.base.pod_weight", "val/miou/all"], [{"trial": 1, "val/miou/all": 0.123456, "x": 2}]
    ).splitlines()
    assert lines == ["| trial | pod_weight | val/miou/all |", "|---|---|---|", "| 1 |  | 0.1235 |"]
    assert table(["error"], [{"error": "a | b\nc"}]).splitlines()[-1] == "| a   b c |"
    many = table(["trial"], [{"trial": number} for number in range(TRIALS + 3)])
    assert many.endswith("and 3 more")
    assert many.count("\n| ") == TRIALS
