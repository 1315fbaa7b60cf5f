"""Installation. Every dependency has bounds and a reason; what only some users need is an extra."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies ``configs/`` into the package; an editable installation finds the clone's folder."""

    def run(self) -> None:
        """Build, then copy the YAML files."""
        super().run()
        if not self.editable_mode:
            source, target = Path(__file__).parent / "configs", Path(self.build_lib) / "fusiontree" / "configs"
            for file in source.rglob("*.yaml"):
                self.mkpath(str((target / file.relative_to(source)).parent))
                self.copy_file(str(file), str(target / file.relative_to(source)))


setup(
    cmdclass={"build_py": BuildWithConfigs},
    packages=find_packages(include=["fusiontree", "fusiontree.*"]),
    install_requires=[
        "torch>=2.11,<3",  # FSDP2 with separate sharding groups, varlen attention, DCP
        "numpy>=1.26,<3",  # memory-mapped token shards, the index of a checkpoint
        "pydantic>=2.7,<3",  # typed, strict configuration
        "pyyaml>=6.0,<7",  # configuration files
        "tokenizers>=0.20,<1",  # tokenizer.json files and BPE training
        "fsspec[http]>=2024.6,<2028",  # shards in object stores and behind HTTP
        "zstandard>=0.22,<1",  # JSONL.zst corpora
        "matplotlib>=3.8,<4",  # loss and gate plots
        "tqdm>=4.66,<5",  # the progress bar of a run in a terminal
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],  # ZeRO-1, 2 and 3 engines; install with DS_BUILD_OPS=0
        "cuda": [
            "flash-attn-4[cu13]>=4.0.0b36,<4.1",  # the fastest attention on Hopper and Blackwell
            "fla-core>=0.6,<0.7",  # kernels of Gated DeltaNet; its functions are called one level below its interface
        ],
        # Faster kernels of Gated DeltaNet for Hopper, which fla-core calls; compiled by the CUDA toolkit's nvcc. Older
        # versions cannot be recorded in CUDA graphs.
        "flash-qla": ["fla-core>=0.6,<0.7", "flash-qla>=0.1.3,<0.2"],
        # Another set of GPU kernels for the scan, built from source; the peer's too. 2.3.2 and newer want an older
        # apache-tvm-ffi than flash-attn-4 does, so that both could not be installed.
        "mamba-ssm": ["mamba-ssm>=2.3.0,<2.3.2"],
        "megatron": ["megatron-core>=0.12,<0.20"],  # import of .bin/.idx corpora by its own reader
        "parquet": ["pyarrow>=15,<30"],  # corpora in Parquet files
        "s3": ["s3fs>=2024.6,<2028"],  # shards at s3://
        "gs": ["gcsfs>=2024.6,<2028"],  # shards at gs://
        "wandb": ["wandb>=0.18,<1"],  # experiment tracker
        "tensorboard": ["tensorboard>=2.14,<3"],  # experiment tracker
        "hf": ["transformers>=4.57,<6"],  # peers and exports, shards at hf://
        # `fusiontree evaluate --lm-eval`; before 0.4.12 the harness gathers results of several processes by accelerate
        # alone.
        "lm-eval": ["lm-eval>=0.4.12,<0.5"],
        "dev": [
            "pytest>=8,<9.2",  # under 9.2, pytest-xdist 3.8 does not keep a group of tests in one process
            "pytest-timeout>=2.3,<3",  # a hung process group must fail, not wait
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",  # property tests of the data order
            "ruff>=0.17,<0.18",
            "mypy>=1.13,<3",
            "types-PyYAML>=6,<7",
            "uv>=0.13,<1",  # pins the CPU environment for every supported Python, whichever one runs
            "triton>=3.4,<4; sys_platform == 'linux'",  # its interpreter runs our GPU kernels on the CPU
            "deepspeed>=0.19.8,<0.20",  # the ZeRO engines are held to the parity table
            "megatron-core>=0.12,<0.20",  # writes the corpora that its import is tested with
            "webdataset>=1.0.2,<2",  # our shards must be readable by it
            "transformers>=4.57,<6",  # its Mamba-2 mixer is an independent reference
            "wandb>=0.18,<1",  # experiment trackers are tested with the real clients
            "tensorboard>=2.14,<3",
        ],
    },
)
