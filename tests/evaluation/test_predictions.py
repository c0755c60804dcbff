"""predictions.csv: exact bytes, replaced atomically."""

from pathlib import Path

import numpy as np

from trainer.evaluation.metrics import evaluate_arrays
from trainer.evaluation.predictions import write_predictions


def test_the_bytes(tmp_path: Path) -> None:
    names = ["a/1.jpg", 'with, comma and "quote".png', "shard-00000#7", "bad\udcff\nname"]
    labels = np.array([0, 1, 1, 0], np.int32)
    probabilities = np.array([[0.75, 0.25], [2 / 3, 1 / 3], [1e-9, 1.0], [1.0, 0.0]], np.float32)
    result = evaluate_arrays("test", ("cat", "café, black"), labels, probabilities, names)
    path = tmp_path / "new" / "predictions.csv"
    path.parent.mkdir()
    path.write_text("old\n" * 1000)
    write_predictions(path, result)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.csv"]
    assert path.read_bytes().decode("utf-8") == (
        "index,file,truth,prediction,probability,correct\n"
        "0,a/1.jpg,cat,cat,0.750000,true\n"
        '1,"with, comma and ""quote"".png","café, black",cat,0.666667,false\n'
        '2,shard-00000#7,"café, black","café, black",1.000000,true\n'
        "3,bad\\udcff\\nname,cat,cat,1.000000,true\n"
    )
