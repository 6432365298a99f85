"""For test_agf.py: notebook 10's functions on two processes."""
import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent


def test_one_sequence_on_two_processes_equals_one(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "notebooks" / "10_a_billion_tokens.ipynb").read_text())["cells"]
    parts = ["".join(c["source"]) for c in cells if "".join(c["source"]).startswith("%%module")]
    (tmp_path / "in_pieces.py").write_text("\n\n".join(p.split("\n", 1)[1] for p in parts))
    monkeypatch.syspath_prepend(tmp_path)
    in_pieces = importlib.import_module("in_pieces")
    torch.multiprocessing.spawn(in_pieces.worker, (2, tmp_path, [37]), nprocs=2)
    ranks = [torch.load(tmp_path / f"result_2_{rank}.pt")[37] for rank in range(2)]
    mixer, x, weight = in_pieces.problem(37)         # parts of 19 and 18 tokens
    out, _ = mixer(x.requires_grad_())
    (out * weight).sum().backward()
    torch.testing.assert_close(torch.cat([r["out"] for r in ranks], 1), out)
    torch.testing.assert_close(torch.cat([r["grad"] for r in ranks], 1), x.grad)
    for name, p in mixer.named_parameters():
        torch.testing.assert_close(ranks[0]["parameters"][name], p.grad, atol=1e-10, rtol=1e-7)
    monkeypatch.setattr(in_pieces.dist, "all_reduce", lambda x: None)
    with pytest.raises(OverflowError, match="700"):
        in_pieces.over_processes(torch.full((1, 1, 1, 2), 800.0), torch.ones(1, 1, 2, 2))
