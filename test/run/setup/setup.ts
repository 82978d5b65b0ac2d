/** `npm run setup`: shows what Steps 1 to 5 of the README still need on a tenant, and does it, as `HELP` says. */
import { createInterface } from "node:readline/promises";
import { setTimeout as delay } from "node:timers/promises";
import { clean, type Print, readOptions, runCommand } from "../command.ts";
import { describeError } from "../../../auth.ts";
import { readEnvironment, readSettings } from "../../../server.ts";
import { type Choices, plan, type Setting, type State, WayNeeded, WAYS } from "./guide.ts";
import { ManagementClient, type Wait } from "./management-client.ts";

const HELP = `Usage: npm run setup -- [--way WAY] [--connection NAME] [--document URL] [--apply [--yes]]

Shows what Steps 1 to 5 of the README still need on this tenant, one line a setting: ok, to do (what is there → what
will be), or by hand (what Auth0's API cannot do, or what is not ours to decide). Changes nothing without --apply.

  --way WAY          how ChatGPT becomes a client: register (it registers itself), cimd (its document is imported) or
                     fixed (an application that you make). Not given: what the tenant is set to already
  --connection NAME  the connection to promote, where there are several
  --document URL     the document to import, where it is not https://chatgpt.com/oauth/client.json: it stands on the
                     connection's page in ChatGPT
  --apply            do what is to do, and stop at the first line that is by hand
  --yes              do not ask before
  --help             show this

Reads the server's environment, and AUTH0_MANAGEMENT_TOKEN: Auth0 Dashboard → Applications → APIs → Auth0 Management
API → API Explorer shows one, good for 24 hours. It is sent to the tenant that it was issued for and nowhere else;
AUTH0_DOMAIN must be that tenant's, or a custom domain of it. The token needs read: and update: of tenant_settings,
resource_servers, connections and actions, read: of client_grants and clients, and create: of resource_servers,
client_grants, clients and actions.

Only ever adds: a value that is there, and on which another application may depend, is left for you to decide. Run it
again after a failure: it goes on with what is left. Exits with 0 when nothing is left to do, with 1 otherwise. The
token is neither printed nor kept.`;

const NO_TOKEN = "AUTH0_MANAGEMENT_TOKEN is missing: copy it from Auth0 Dashboard → Applications → APIs → Auth0 " +
  "Management API → API Explorer, and put it into .env";

export interface Options {
  way?: string | undefined;
  connection?: string | undefined;
  document?: string | undefined;
  apply?: boolean | undefined;
  yes?: boolean | undefined;
}

export type Line = Omit<Setting, "read"> & State;

/** Reads the state of each setting. Changes nothing. */
export async function look(settings: Setting[]): Promise<Line[]> {
  const lines: Line[] = [];
  for (const { read, ...setting } of settings) lines.push({ ...setting, ...await read() });
  return lines;
}

/**
 * @param env AUTH0_DOMAIN and MCP_SERVER_URL as the server reads them, and AUTH0_MANAGEMENT_TOKEN.
 * @param print Takes a line, or several.
 * @param ask Whether to go on. Left out where nobody can be asked.
 * @returns The exit status.
 * @throws {Error} What is wrong with the environment, in the server's words.
 */
export async function setup(
  env: Record<string, string | undefined>,
  options: Options,
  print: (text: string) => void,
  ask?: (question: string) => Promise<boolean>,
  wait: Wait = delay,
): Promise<number> {
  const { MCP_SERVER_URL: serverUrl, issuer } = readSettings(env);
  const token = env.AUTH0_MANAGEMENT_TOKEN?.trim() ?? "";
  const say = (text: string) => print(clean(text, [token]));
  try {
    const { connection, document, apply, yes } = options;
    const way = WAYS.find((one) => one === options.way);
    if (options.way !== undefined && !way) throw new Error(`--way must be one of ${WAYS.join(", ")}`);
    if (document !== undefined && !URL.canParse(document)) throw new Error("--document must be a URL");
    if (apply && !yes && !ask) throw new Error("--apply asks first, and there is no terminal to ask on: add --yes");
    if (!token) throw new Error(NO_TOKEN);

    const auth0 = new ManagementClient(issuer, token, wait, say);
    const choices = { serverUrl, way, document, connection };
    const first = await plan(auth0, choices);
    say(`${first.about}\n`);
    const lines = await look(first.settings);
    for (const line of lines) say(describe(line));

    const left = lines.filter(({ status }) => status !== "ok");
    if (left.length === 0) return succeed(say);
    const toDo = left.filter(({ status }) => status === "to do").length;
    if (!apply || left[0]?.status === "by hand") {
      const hint = apply
        ? " Nothing was changed: do the first one that is by hand, and run this again."
        : toDo > 0
        ? " npm run setup -- --apply does what is to do."
        : "";
      say(`\n${toDo} to do, ${left.length - toDo} by hand.${hint}`);
      return 1;
    }
    if (!yes && !await ask?.(`\nDo what is to do, in ${issuer}? [y/N] `)) {
      say("Nothing was changed.");
      return 1;
    }
    say("");
    const stop = await applyAll(auth0, { ...choices, way: first.way }, say);
    if (!stop) return succeed(say);
    say(`\nStopped at what is by hand: Step ${stop.step}, ${stop.what}. Run this again when it is done.`);
    return 1;
  } catch (error) {
    say(error instanceof WayNeeded ? error.message : describeError(error));
    return 1;
  }
}

function succeed(say: (text: string) => void): number {
  say("\nNothing is left to do: on to Step 7.");
  return 0;
}

/**
 * Makes the settings, and reads them again until nothing changes: a new API may require a grant, for instance.
 *
 * @returns The first setting that only a person can make.
 */
async function applyAll(
  auth0: ManagementClient,
  choices: Choices,
  say: (text: string) => void,
): Promise<Setting | undefined> {
  for (let isChanged = true, rounds = 0; isChanged; rounds++) {
    if (rounds === 10) throw new Error("Something undoes these changes: find out what, and run this again");
    isChanged = false;
    auth0.forget(); // somebody may have changed something before the answer to the question
    const { settings } = await plan(auth0, choices);
    for (const setting of settings) {
      const line = await auth0.patiently(() => applyOne(setting));
      if (line?.status === "by hand") return setting;
      if (line) say(describe(line, "done"));
      isChanged ||= line !== undefined;
    }
  }
  return undefined;
}

/** @returns The state of the setting afterwards, or undefined where it was right before. */
async function applyOne({ read, ...setting }: Setting): Promise<Line | undefined> {
  const before = await read();
  if (before.status === "ok") return undefined;
  if (before.status === "by hand") return { ...setting, ...before };
  await before.apply();
  const after = await read();
  if (after.status === "ok") return { ...setting, ...after };
  throw new Error(`${setting.what}: Auth0 took the change, and still says ${after.found}`);
}

function describe({ step, what, ...state }: Line, mark: string = state.status): string {
  const more = state.status === "to do" ? ` → ${state.will}` : state.status === "by hand" ? `\n${state.how}` : "";
  const text = `${what}: ${state.found}${more}`;
  return `${mark.padEnd(9)}Step ${step.padEnd(2)}  ${text.replaceAll("\n", `\n${" ".repeat(18)}`)}`;
}

/** As the command line runs it. */
export async function main(args: string[], print: Print): Promise<number> {
  const options = readOptions(
    args,
    {
      way: { type: "string" },
      connection: { type: "string" },
      document: { type: "string" },
      apply: { type: "boolean" },
      yes: { type: "boolean" },
    },
    HELP,
    print,
  );
  if (!options) return 0;
  return await setup(readEnvironment(), options, print, process.stdin.isTTY ? askOnTerminal : undefined);
}

async function askOnTerminal(question: string): Promise<boolean> {
  const terminal = createInterface({ input: process.stdin, output: process.stdout });
  const answer = await terminal.question(question).finally(() => terminal.close());
  return /^y(es)?$/i.test(answer.trim());
}

await runCommand(import.meta.url, main);
