"""Tests of RecordLog: rows are returned by request and in order, for any sequence of batches."""

from __future__ import annotations

import torch

from osd.engine.record import RecordLog, dump_records, load_records

R, H = 3, 5
# Request ids of each step: requests start, end, change rows and pause; some batches repeat.
BATCHES = [["a"], ["a", "b"], ["a", "b"], ["b", "a"], ["b", "c", "a"], ["b", "c"], ["b", "c"], ["c"], ["a", "c"]]


def test_rows_are_returned_by_request_and_in_order():
    log = RecordLog(weights_version=4)
    expected: dict[str, list[torch.Tensor]] = {}
    hidden: dict[str, list[torch.Tensor]] = {}
    topk: dict[str, list[torch.Tensor]] = {}
    torch.manual_seed(0)
    for ids in BATCHES:
        values_BR, hidden_BH = torch.randn(len(ids), R), torch.randn(len(ids), H, dtype=torch.bfloat16)
        topk_BX = torch.randn(len(ids), 7)
        log.append(ids, values_BR, hidden_BH, topk_BX)
        for row, request_id in enumerate(ids):
            expected.setdefault(request_id, []).append(values_BR[row])
            hidden.setdefault(request_id, []).append(hidden_BH[row])
            topk.setdefault(request_id, []).append(topk_BX[row])
    log.admitted("teacher", "a", 7)
    log.admitted("student", "d", 2)  # admitted but never sampled
    records = load_records(dump_records(log.take()))
    assert records.keys() == {"a", "b", "c", "d"}
    for request_id, rows in expected.items():
        assert torch.equal(records[request_id].values_TR, torch.stack(rows))
        assert torch.equal(records[request_id].hidden_TH, torch.stack(hidden[request_id]))
        assert torch.equal(records[request_id].topk_TX, torch.stack(topk[request_id]))
        assert records[request_id].weights_version == 4
    assert (records["a"].teacher_cached_tokens, records["d"].student_cached_tokens) == (7, 2)
    assert records["d"].hidden_TH is None
    assert not log.take()


def test_hidden_states_may_be_missing_for_some_steps():
    log = RecordLog()
    log.append(["a", "b"], torch.zeros(2, R), None)
    log.append(["a"], torch.ones(1, R), torch.ones(1, H))
    records = log.take()
    assert records["a"].values_TR[:, 0].tolist() == [0, 1]
    assert records["a"].hidden_TH.shape == (1, H)
    assert records["b"].hidden_TH is None


def test_positions_of_rejected_drafts_are_left_out():
    """Cycles with several rows of a request, some of them void, beside a step without drafts."""
    log, number = RecordLog(), 0
    expected: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    rng = torch.Generator().manual_seed(0)
    for ids in [["a", "a", "a", "b", "b"]] * 4 + [["b", "a"]] + [["b", "a", "a"]] * 3:
        values = torch.arange(number, number + len(ids)).float()[:, None].expand(-1, R)
        kept = torch.rand(len(ids), generator=rng) < 0.6
        origin = torch.randint(1, 4, (len(ids), 1), generator=rng).to(torch.uint8)
        drafts = {} if ids == ["b", "a"] else dict(kept_B=kept, origin_B1=origin)
        log.append(ids, values, values[:, :1].repeat(1, H), values[:, :1].repeat(1, 7), **drafts)
        for row, request_id in enumerate(ids):
            if not drafts or kept[row]:
                expected[request_id].append((number + row, int(origin[row]) if drafts else 0))
        number += len(ids)
    records = load_records(dump_records(log.take()))
    for request_id, rows in expected.items():
        record = records[request_id]
        assert list(zip(record.values_TR[:, 0].tolist(), record.origin_T1[:, 0].tolist(), strict=True)) == rows
        assert record.hidden_TH[:, 0].tolist() == record.topk_TX[:, 6].tolist() == [value for value, _ in rows]
