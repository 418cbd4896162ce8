"""The boards that are emulated: which CPU, and what its Linux would say of it.

In: nothing. Out: profiles by word, each with the files of /proc and /sys from which the runtimes
choose their kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

CORES = 4
ARMV8_0 = "fp asimd aes pmull sha1 sha2 crc32 cpuid"
ARMV8_2 = (
    "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
)
ARMV8_6 = (
    "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop "
    "sha3 sm3 sm4 asimddp sha512 asimdfhm ilrcpc flagm sb paca pacg dcpodp flagm2 frint i8mm bf16 "
    "rng bti mte"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One emulated CPU.

    Attributes:
        name: Its word, the address in `emulated-arm64:WORD`.
        cpu: As `qemu-aarch64 -cpu` takes it.
        part: Arm's part number, by which libraries choose kernels for a core.
        features: What it can, in Linux's words: those of the HWCAP that QEMU gives it.
        describes: For a person.
        most_mhz: The clock that its Linux would name; emulated, it has none.
    """

    name: str
    cpu: str
    part: int
    features: str
    describes: str
    most_mhz: int

    @property
    def midr(self) -> int:
        """The register that names the core: implementer, variant, architecture, part, revision."""
        return 0x41 << 24 | 0xF << 16 | self.part << 4 | 1

    def files(self) -> dict[str, str]:
        """Return the files of /proc and /sys, by their path without the leading slash."""
        one = (
            "BogoMIPS\t: 108.00\n"
            f"Features\t: {self.features}\n"
            "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
            f"CPU part\t: {self.part:#05x}\nCPU revision\t: 1\n\n"
        )
        cpu, every = "sys/devices/system/cpu", f"0-{CORES - 1}\n"
        found = {"proc/cpuinfo": "".join(f"processor\t: {n}\n{one}" for n in range(CORES))}
        found |= {f"{cpu}/{name}": every for name in ("possible", "present", "online")}
        found[f"{cpu}/kernel_max"] = "255\n"
        for n in range(CORES):
            found |= {
                f"{cpu}/cpu{n}/regs/identification/midr_el1": f"{self.midr:#018x}\n",
                f"{cpu}/cpu{n}/topology/physical_package_id": "0\n",
                f"{cpu}/cpu{n}/topology/core_id": f"{n}\n",
                f"{cpu}/cpu{n}/topology/core_siblings_list": every,
                f"{cpu}/cpu{n}/topology/thread_siblings_list": f"{n}\n",
                f"{cpu}/cpu{n}/cpufreq/cpuinfo_max_freq": f"{1000 * self.most_mhz}\n",
                f"{cpu}/cpu{n}/cpufreq/cpuinfo_min_freq": "600000\n",
            }
        return found


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="pi3",
            cpu="cortex-a53",
            part=0xD03,
            features=ARMV8_0,
            describes="Raspberry Pi 3: Cortex-A53",
            most_mhz=1400,
        ),
        Profile(
            name="pi4",
            cpu="cortex-a72",
            part=0xD08,
            features=ARMV8_0,
            describes="Raspberry Pi 4: Cortex-A72",
            most_mhz=1800,
        ),
        Profile(
            name="pi5",
            cpu="cortex-a76",
            part=0xD0B,
            features=ARMV8_2,
            describes="Raspberry Pi 5: Cortex-A76, dot product",
            most_mhz=2400,
        ),
        Profile(
            name="phone",
            # Plain `max` computes dynamic int8 wrongly; and no phone's int8 kernels need SVE.
            cpu="max,sme=off,sve=off",
            part=0xD47,
            features=ARMV8_6,
            describes="a phone of the Cortex-A710 kind: dot product, int8 matrix products",
            most_mhz=2500,
        ),
    )
}
