"""Traces: what files say, what is drawn from records, and what is made up."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from autoscaler.simulate import load_trace
from autoscaler.simulate.traces import expand, prefix_hits


def write(path: Path, header: str, *rows: str) -> Path:
    lines = "\n".join([header, *rows, ""])
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz"])
def test_a_file_of_the_users_own_is_read_from_its_first_arrival_in_order(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "arrival_s,input_tokens,output_tokens", "12.5,7,8", "10,100,20", "11,3,0")
    made = load_trace(str(path))
    assert made.arrival_s.tolist() == [0.0, 1.0, 2.5]
    assert made.input_tokens.tolist() == [100, 3, 7]
    assert made.output_tokens.tolist() == [20, 1, 8]  # a request that wanted nothing still gets a token
    assert made.cached_tokens.tolist() == [0, 0, 0]


def test_a_file_with_a_wrong_column_or_value_says_which(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "arrival_s,input_tokens", "1,2")
    with pytest.raises(ValueError, match="has no column output_tokens"):
        load_trace(str(path))
    path = write(tmp_path / "b.csv", "arrival_s,input_tokens,output_tokens", "1,2,many")
    with pytest.raises(ValueError, match=r"column output_tokens: .*'many'"):
        load_trace(str(path))
    path = write(tmp_path / "c.csv", "arrival_s,input_tokens,output_tokens")
    with pytest.raises(ValueError, match="has no requests"):
        load_trace(str(path))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("azure:0", "times is 0; it must be above 0"),
        ("spikes:rate", "'rate' is not name=value"),
        ("spikes:rate=4,colour=3", "unknown option 'colour'"),
        ("spikes:rate=fast", "rate is 'fast': not a number"),
        ("nonsense", "neither a file nor one of azure"),
        ("servegen-m-tiny:rate=4", "needs servegen_m-tiny_clients.csv.gz"),
        ("servegen-m-small:days=0", "days is 0: not a range of days"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name: str, why: str, folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_trace(name, folder)
    assert why in str(error.value)
    assert name in str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recorded traces of a small world."""
    write(
        tmp_path / "azure2023_conv.csv.gz",
        "arrival_s,input_tokens,output_tokens",
        *(f"{10 * row},{100 + row},5" for row in range(400)),
    )
    write(
        tmp_path / "mooncake_conversation.csv.gz",
        "arrival_s,input_tokens,output_tokens,prefix_block_hashes_512",
        "0,1500,5,0-2",
        "1,1600,5,0-1 7 8",
        "2,700,5,9 0",
        "3,1024,5,0-1",
    )
    hours = [f"{client},{start},{rate},1,{pattern},0.3,9" for client, rate, pattern in CLIENTS for start in (0, 600)]
    write(
        tmp_path / "servegen_m-small_clients.csv.gz",
        "client,window_start_s,rate_rps,cv,pattern_G_or_W,shape,scale",
        *hours,
    )
    marks = "q05_25_50_75_90_95_99_100"
    write(
        tmp_path / "servegen_m-small_lengths.csv.gz",
        f"client,window_start_s,mean_input,input_{marks},mean_output,output_{marks}",
        "1,0,100,50 60 70 80 90 95 99 200,10,5 6 7 8 9 10 11 20",
        "2,0,2000,1000 1500 2000 2500 2800 2900 2950 3000,10,30 30 30 30 30 30 30 30",
    )
    return tmp_path


CLIENTS = [(0, 4.0, "G"), (1, 2.0, "W"), (2, 6.0, "G")]


def test_a_rate_is_scaled_up_by_copies_that_come_a_little_later(folder: Path) -> None:
    once, scaled = load_trace("azure", folder), load_trace("azure:3.5", folder)
    assert len(scaled) == pytest.approx(3.5 * len(once), rel=0.05)
    # Each copy is a request of the original, at most the jitter later
    late = scaled.arrival_s - 10 * (scaled.input_tokens - 100)
    assert 0 <= late.min() <= late.max() <= 2
    assert (late == 0).sum() == len(once)


def test_a_rate_is_scaled_down_by_leaving_requests_out(folder: Path) -> None:
    once, thinned = load_trace("azure", folder), load_trace("azure:0.25", folder)
    assert len(thinned) == pytest.approx(len(once) / 4, rel=0.3)
    assert set(thinned.arrival_s) <= set(once.arrival_s)


@pytest.mark.parametrize("name", ["azure:2.5", "servegen-m-small:rate=5,hours=0-1", "spikes", "diurnal:hours=2,rate=2"])
def test_a_seed_is_all_the_chance_there_is(folder: Path, name: str) -> None:
    one, same, other = (load_trace(name, folder, seed) for seed in (1, 1, 2))
    assert one.arrival_s.tolist() == same.arrival_s.tolist()
    assert one.input_tokens.tolist() == same.input_tokens.tolist()
    assert one.arrival_s.tolist() != other.arrival_s.tolist()
    assert (np.diff(one.arrival_s) >= 0).all()


def test_prefix_hashes_say_what_a_cache_would_have_had(folder: Path) -> None:
    made = load_trace("mooncake:cache_tokens=100000", folder)
    assert made.cached_tokens.tolist() == [0, 1024, 0, 1023]  # only leading blocks, and never the last token
    assert load_trace("mooncake:cache_tokens=512", folder).cached_tokens.tolist() == [0, 0, 0, 512]


def test_a_bounded_cache_forgets_what_was_not_asked_for_longest() -> None:
    asked = [[1, 2], [3], [1, 2], [3, 4], [1]]
    assert prefix_hits(asked, None) == [0, 0, 2, 1, 1]
    assert prefix_hits(asked, 3) == [0, 0, 2, 1, 0]
    assert list(expand("46-48 2353")) == [46, 47, 48, 2353]


def test_servegen_keeps_the_wanted_rate_the_shares_of_clients_and_their_lengths(folder: Path) -> None:
    # 20 minutes of records in a day of which only they are taken
    made = load_trace("servegen-m-small:rate=10,hours=0-1,seed=3", folder)
    assert len(made) == pytest.approx(3600 * 10, rel=0.1)
    assert made.duration_s <= 1200
    second = made.output_tokens == 30
    # Client 2 has half of the requests; client 0, of which no length was recorded, is like the others by their rates
    assert second.mean() == pytest.approx((6 + 4 * 6 / 8) / 12, abs=0.05)
    assert 1000 <= made.input_tokens[second].min() <= made.input_tokens[second].max() <= 3000
    assert np.median(made.input_tokens[~second]) == pytest.approx(70, rel=0.05)


def test_a_renewal_process_does_not_start_in_step_with_its_window(folder: Path) -> None:
    made = load_trace("servegen-m-small:rate=10,hours=0-1,seed=3", folder)
    first_minute = ((made.arrival_s % 600) < 60).mean()
    assert first_minute == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(
    ("name", "peak"), [("poisson", 1), ("steps", 3), ("spikes:every=300", 4), ("ramps", 4), ("diurnal:day=3600", 4)]
)
def test_made_up_traffic_has_the_rate_that_it_says(name: str, peak: float) -> None:
    name += f"{',' if ':' in name else ':'}rate=30,hours=1,input=500,output=50"
    made = load_trace(name, seed=4)
    per_minute = np.bincount((made.arrival_s / 60).astype(int)) / 60
    assert per_minute.min() == pytest.approx(30, rel=0.3)
    assert per_minute.max() == pytest.approx(30 * peak, rel=0.3)
    assert made.input_tokens.mean() == pytest.approx(500, rel=0.05)
    assert made.output_tokens.mean() == pytest.approx(50, rel=0.05)


def test_recorded_traces_are_read(test_data: Path) -> None:
    folder = test_data / "traces"
    if not folder.is_dir():
        pytest.skip(f"no traces at {folder}")
    with gzip.open(folder / "azure2023_conv.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    made = load_trace("azure", folder)
    assert len(made) == len(rows)
    assert made.output_tokens.sum() == sum(int(row["output_tokens"]) for row in rows)


def test_what_no_server_takes_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "arrival_s,input_tokens,output_tokens", "1,100,5", "2,900,101")
    made = load_trace(str(path))
    assert made.within(1001) is made
    assert made.within(1000).input_tokens.tolist() == [100]
