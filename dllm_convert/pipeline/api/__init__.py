"""The front door: what the commands do, as functions; `import dllm_convert` offers them.

Each imports what it needs when it is called: a plan takes no torch. What takes long (`convert`,
`evaluate`, `push`) tells its progress on stderr as the commands do, everything else is silent; a
`Reporter` of one's own decides otherwise.
"""
