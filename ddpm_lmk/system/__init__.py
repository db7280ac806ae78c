"""The operating system: files, processes, signals and what the machine grants. What only Linux has is used here alone.

| on Linux | elsewhere (macOS) |
|---|---|
| cores granted: affinity, control group, scheduler (`machine`) | all cores, unless a scheduler says fewer |
| memory of the control group (`machine`) | memory of the machine |
| the kernel ends a child with its parent (`processes`) | a thread of the child checks for its parent every second |
| decoders and importers under a limit of addresses (`limits`) | no such limit: a decoder may take all memory |
| importers without network (`limits`) | with it |

`limits.absent` lists what is missing on the machine at hand; `ddpm-lmk doctor` shows it. No module but `accelerator`
imports torch.
"""
