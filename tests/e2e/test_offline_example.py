import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_of_the_readme_runs(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (example,) = [block for block in blocks if "engine.llm" in block]
    assert 'LLM("demo")' in example
    exec(example.replace('"demo"', f'"{tiny_llama}", kv_cache_bytes=1 << 22'), {})
    printed = capsys.readouterr().out
    assert printed.startswith("The capital of France is")
    assert "\nA diptych is" in printed
