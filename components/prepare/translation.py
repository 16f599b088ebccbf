"""Translation, German and English: LibreOffice's help for training, GNOME's for a test in another domain.

Both come as Debian packages; ``components.prepare.help_pages`` reads and cleans them. The prompt is ALMA's (Xu et al.,
arXiv 2309.11674).
"""

import hashlib
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from components.prepare.corpus import Row, phase, readme_of, shuffled, split_rows, write_corpus
from components.prepare.help_pages import Pair, clean_pairs, read_gnome, read_libreoffice

LANGUAGES = {"de": "German", "en": "English"}
PACKAGES = {
    "libreoffice-help-en-us": "MPL-2.0",
    "libreoffice-help-de": "MPL-2.0",
    "gnome-user-docs": "CC-BY-SA-3.0",
}
_PROMPT = "Translate this from {source_language} to {target_language}:\n{source_language}: {source}\n{target_language}:"


def prepare_translation(
    output_dir: Path,
    *,
    source_language: str = "de",
    packages_dir: Path | None = None,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    seed: int = 0,
) -> None:
    """Make a corpus of sentences to translate.

    Args:
        output_dir: an earlier corpus there is replaced.
        source_language: ``"de"`` to translate into English, ``"en"`` to translate into German.
        packages_dir: holds one .deb file of each package; None downloads them with apt-get.
        validation_fraction: share of the pages held out.
        test_fraction: share held out for the end.
        seed: decides which are held out.

    Raises:
        ValueError: a package or a tool is missing, ``output_dir`` holds other things, or a part would be empty.
    """
    dropped: dict[str, Counter[str]] = {"libreoffice-help": Counter(), "gnome-user-docs": Counter()}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with phase("unpacking the Debian packages"):
            sources = unpack(root, packages_dir)
        with phase("reading LibreOffice's help"):
            pairs = clean_pairs(read_libreoffice(root), dropped=dropped["libreoffice-help"])
        with phase("reading GNOME's help"):
            others = clean_pairs(read_gnome(root), seen=pairs, dropped=dropped["gnome-user-docs"])
    about = {
        "corpus": "translation",
        "source_language": source_language,
        "sources": sources,
        "dropped": {name: dict(sorted(counts.items())) for name, counts in dropped.items()},
        "split": {
            "by": "group",
            "seed": seed,
            "validation_fraction": validation_fraction,
            "test_fraction": test_fraction,
        },
    }
    with phase(f"writing {len(pairs)} and {len(others)} pairs"):
        parts = split_rows(
            shuffled((make_record(pair, source_language) for pair in pairs), seed=seed),
            key="group",
            seed=seed,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
        )
        parts["out_of_domain"] = shuffled((make_record(pair, source_language) for pair in others), seed=seed)
        write_corpus(output_dir, parts, about=about, readme=readme_of("translation", sources))
    print(f"made {output_dir}")


def make_record(pair: Pair, source_language: str) -> Row:
    """A record of a pair of texts; its completion begins with the space that separates it from the prompt."""
    target_language = "en" if source_language == "de" else "de"
    prompt = _PROMPT.format(
        source_language=LANGUAGES[source_language],
        target_language=LANGUAGES[target_language],
        source=pair[source_language],
    )
    return {
        "id": pair["id"],
        "group": pair["group"],
        "origin": pair["origin"],
        "prompt": prompt,
        "completion": f" {pair[target_language]}",
        "source": pair[source_language],
        "source_language": source_language,
        "target_language": target_language,
    }


def unpack(root: Path, packages_dir: Path | None) -> list[dict[str, str]]:
    """Unpack the three packages into ``root``.

    Args:
        root: an existing folder.
        packages_dir: holds their .deb files; None downloads them.

    Returns:
        Name, version, licence and SHA-256 of each, for the manifest.

    Raises:
        ValueError: a file or a tool is missing, or the download failed.
    """
    for tool in ["dpkg-deb", *([] if packages_dir else ["apt-get"])]:
        if shutil.which(tool) is None:
            raise ValueError(f"{tool} is not on PATH; run this on Debian or Ubuntu")
    if packages_dir is None:
        packages_dir = root / "packages"
        packages_dir.mkdir()
        _run("apt-get", "download", *PACKAGES, folder=packages_dir)
    sources = []
    for name, license in PACKAGES.items():
        files = sorted(packages_dir.glob(f"{name}_*.deb"))
        if len(files) != 1:
            raise ValueError(
                f"{packages_dir} holds {len(files)} files {name}_*.deb; run there: apt-get download {name}"
            )
        _run("dpkg-deb", "-x", str(files[0].resolve()), str(root), folder=root)
        sources.append(
            {
                "name": name,
                "version": _run("dpkg-deb", "-f", str(files[0].resolve()), "Version", folder=root).strip(),
                "license": license,
                "from": "Debian",
                "sha256": hashlib.sha256(files[0].read_bytes()).hexdigest(),
            }
        )
    return sources


def _run(*command: str, folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"{command[0]} failed ({reason}); run apt-get update, or download {', '.join(PACKAGES)} elsewhere and give "
            "their folder as --packages-dir"
        )
    return result.stdout
