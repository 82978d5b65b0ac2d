/** What the files in run/ share: each is a function for its tests, and a command where it is run itself. */
import { realpathSync } from "node:fs";
import { fileURLToPath } from "node:url";

/** @param moduleUrl The file's `import.meta.url`. */
export function isMain(moduleUrl: string): boolean {
  const [, script] = process.argv;
  return script !== undefined && realpathSync(script) === fileURLToPath(moduleUrl);
}

/** Runs a command whose result is its exit status; what it throws is one line, and status 1. */
export async function runCommand(main: () => Promise<number>): Promise<void> {
  process.exitCode = await main().catch((error: unknown) => {
    console.error(error instanceof Error ? error.message : error);
    return 1;
  });
}
