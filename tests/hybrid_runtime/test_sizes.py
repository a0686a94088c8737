"""Amounts of memory: every spelling has one meaning, everything else is refused with examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_runtime.errors import UsageError
from hybrid_runtime.sizes import MAX_BYTES, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("0G", 0),
        ("1", 1),
        ("512", 512),
        ("512B", 512),
        ("512.0", 512),
        ("8589934592", 8 * 2**30),
        ("1K", 1024),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1kib", 1024),
        ("1Ki", 1024),
        ("1KB", 1000),
        ("1kb", 1000),
        ("8M", 8 * 2**20),
        ("8MiB", 8 * 2**20),
        ("8MB", 8 * 10**6),
        ("8G", 8 * 2**30),
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8 GiB", 8 * 2**30),
        ("  8G\n", 8 * 2**30),
        ("008G", 8 * 2**30),
        ("2T", 2 * 2**40),
        ("2TiB", 2 * 2**40),
        ("2TB", 2 * 10**12),
        ("1.5G", 3 * 2**29),
        (".5G", 2**29),
        ("1.G", 2**30),
        ("1.5GB", 1_500_000_000),
        ("0.7G", 751619276),  # 751619276.8: down, a budget is not exceeded by rounding
        ("1048576T", MAX_BYTES),
        (str(MAX_BYTES), MAX_BYTES),
        ("9007199254740993", 2**53 + 1),  # no float on the way
    ],
)
def test_an_amount_is_read_exactly(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "G", "GiB", "-1", "-1G", "+1", "nan", "NaN", "inf", "1e9", "0x10", "1_000", "1,5G", "1..5G", ".", ".G",
        "8 GB free", "8GBps", "8Gi B", "8  G", "8X", "8BB", "8iB", "8Bi", "8GBiB", "eight", "\u0668G", "\uff18G",
        "8G\u0131", "8\x00", "8G\n8G", "1.5.2", "9" * 5000, "\ud800",
    ],
    ids=ascii,
)  # fmt: skip
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(UsageError, match=r"expected a number and a unit.*8GiB.*1\.5G") as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["1.5", "0.5B", ".1"])
def test_a_fraction_of_a_byte_is_taken_for_a_forgotten_unit(text):
    with pytest.raises(UsageError, match=r"whole bytes.*add the unit"):
        parse_bytes(text)


@pytest.mark.parametrize("text", [str(MAX_BYTES + 1), "1048576.001T", "2E", "9" * 30 + "T"])
def test_more_than_any_machine_has_is_refused(text):
    with pytest.raises(UsageError, match=r"at most 2\*\*60"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_no_text_does_anything_but_parse_or_be_refused(text):
    try:
        num_bytes = parse_bytes(text)
    except UsageError:
        return
    assert 0 <= num_bytes <= MAX_BYTES


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**20 - 6, "1023.99 KiB"),
        (2**20, "1.00 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (8 * 10**9, "7.45 GiB"),
        (2**40, "1.00 TiB"),
        (2**50 - 1, "1.00 PiB"),
        (2**60, "1.00 EiB"),
        (2**70, "1024.00 EiB"),
        (-1536, "-1.50 KiB"),
        (-1, "-1 B"),
    ],
)
def test_an_amount_is_shown_in_the_largest_fitting_unit(num_bytes, shown):
    assert format_bytes(num_bytes) == shown


@given(st.integers(0, MAX_BYTES - 2**53))
def test_what_is_shown_reads_back_within_its_two_decimals(num_bytes):
    # two decimals of a number >= 1 are off by at most half a percent
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.00502, abs=1)
