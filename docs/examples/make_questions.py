"""A corpus for the tutorial: questions with one right answer each, held out by their first number."""

import json
import random
from pathlib import Path

folder = Path("data/questions")
folder.mkdir(parents=True, exist_ok=True)
pairs = [(a, b) for a in range(100) for b in range(2, 12)]
random.Random(0).shuffle(pairs)
parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
for a, b in pairs:
    record = {"prompt": f"What is {a} + {b}?", "completion": f" {a} + {b} = {a + b}"}
    parts["validation" if a % 10 == 7 else "train"].append(record)
for name, records in parts.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{folder / name}.jsonl: {len(records)} records")
