"""What the operating system gives and what it takes away. Whatever only Linux has is called from here and nowhere else.

| on Linux | elsewhere (macOS) |
|---|---|
| cores granted: affinity, control group, scheduler (`cores`) | all cores, unless a scheduler says fewer |
| memory of the control group (`memory`) | memory of the machine |
| the kernel ends a child with its parent (`processes`) | a thread of the child looks for its parent every second |
| decoders and importers under a limit of addresses (`limits`) | no such limit: a decoder may take all memory |
| importers without network (`limits`) | with it |

`limits.absent` lists what is missing on the machine at hand; `ddpm-lmk doctor` shows it. `environment` is about what
other launchers left behind. Never imports torch.
"""
