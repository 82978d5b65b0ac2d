/** `npm run doctor`: looks at the tenant and at the running server from outside, as `HELP` says. */
import { spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { parseArgs } from "node:util";
import { isMain, runCommand } from "../command.ts";
import { describeError } from "../../../auth.ts";
import { readEnvironment, readSettings } from "../../../server.ts";
import * as checks from "./checks.ts";
import { CannotTell, findCause, hide } from "./checks.ts";
import type { Found, Run, Token } from "./checks.ts";
import { plan } from "../setup/guide.ts";
import { ManagementClient } from "../setup/management-client.ts";
import { look } from "../setup/setup.ts";

const HELP = `Usage: npm run doctor -- [--register | --login | --client ID]

Looks at the tenant and at the running server from outside, and names the step of the README that is missing.

  --register    register a client, which is a new application in the tenant, and go as far as the sign-in page
  --login       do that too, sign you in through your browser, and call the tools
  --client ID   register none: go to the sign-in page as a client that is there, either a fixed application
                or a document of ChatGPT's (https://chatgpt.com/oauth/...)
  --help        show this

Reads the server's environment, and where they are set: AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET of Step 6, and
AUTH0_MANAGEMENT_TOKEN, with which it begins with what npm run setup shows.

Prints one line a check: ok, missing, or cannot tell where an earlier check failed or the answer does not show
from outside. Exits with 1 if something is missing. Tokens, codes and secrets are never printed.`;

export interface Options {
  register?: boolean | undefined;
  login?: boolean | undefined;
  /** Id of a client that is there already: nothing is registered then. */
  client?: string | undefined;
}

/** The remedy stands in the README under `heading`, or else under the step. */
type Check = [step: number, what: string, run: Run, remedy: string, heading?: string];
type Section = [title: string, checks: Check[]];

const SERVER: Check[] = [
  [0, "server", checks.reachServer, "Start the server and the tunnel"],
  [0, "HTTPS", checks.expectHttps, "ChatGPT calls from the internet: open a tunnel"],
  [0, "call without a token", checks.expect401, "Compare MCP_SERVER_URL with the running server's"],
  [0, "challenge", checks.readChallenge, "A proxy or another MCP_SERVER_URL changes it", "Deploy"],
  [0, "metadata", checks.readMetadata, "Route /.well-known/ to the server too", "Deploy"],
  [0, "resource", checks.compareResource, "The server has another MCP_SERVER_URL: restart it"],
  [0, "authorization server", checks.compareTenant, "The server has another AUTH0_DOMAIN: restart it"],
  [0, "caches", checks.expectNoCache, "Switch caching off for this host", "Deploy"],
  [0, "Origin and CORS", checks.callAsBrowser, "A proxy answers in the server's place", "Deploy"],
  [0, "bot rules", checks.callAsHosts, "Let both through", "403 from a bot rule"],
];

const TENANT: Check[] = [
  [0, "discovery", checks.readDiscovery, "Compare AUTH0_DOMAIN with the tenant's domain"],
  [0, "clock", checks.compareClock, "Set this machine's clock", "401 after a good login"],
  [0, "issuer", checks.compareIssuer, "AUTH0_DOMAIN must be where users sign in", "401 after a good login"],
  [0, "PKCE", checks.expectS256, "AUTH0_DOMAIN must lead to Auth0 itself"],
  [0, "signing keys", checks.readSigningKeys, "The server must reach them, too", "503 Service Unavailable"],
  [2, "issuer identification", checks.tellIssuerIdentification, ""],
  [2, "CIMD", checks.tellCimd, ""],
];

const REGISTRATION = "Enable client registration";
const OOPS = "Oops!, something went wrong";

const NEW_CLIENT: Check[] = [
  [2, "registration", checks.registerClient, "Pass --client with yours, or switch it on", REGISTRATION],
  [2, "kind of client", checks.tellKind, ""],
  [3, "sign-in page", checks.openSignInPage, "Read Monitoring → Logs", OOPS],
];

const GIVEN_CLIENT: Check[] = [
  [2, "client", checks.useClient, "Switch CIMD on, and copy the address from ChatGPT's page", REGISTRATION],
  [3, "sign-in page", checks.openSignInPage, "Read Monitoring → Logs", OOPS],
];

const tokenChecks = (step: number): Check[] => [
  [1, "claims", checks.verifyClaims, "Compare found and expected", "401 after a good login"],
  [1, "scopes of the API", checks.expectApiScopes, "Grant the permissions", "Permissions per tool"],
  [step, "initialize", checks.initialize, "The server says above what it expects", "401 after a good login"],
  [step, "tools/list", checks.listTools, "Read the server's log", "ChatGPT shows no tools, or old ones"],
  [step, "get_profile", checks.getProfile, "Read the server's log", "ChatGPT shows no tools, or old ones"],
];

const MACHINE: Check[] = [
  [6, "token", checks.requestToken, "Compare the two settings, and authorize the application for the API"],
  [1, "kind of token", checks.expectJwt, "Switch JSON Web Encryption (JWE) off", "API Settings"],
  ...tokenChecks(6),
];

const USER: Check[] = [
  [3, "sign-in", checks.signIn, "Read Monitoring → Logs", OOPS],
  [2, "issuer of the answer", checks.compareAnswer, "Let proxies pass it on", "The answer names no issuer"],
  [1, "token", checks.exchangeCode, "Set the Default Permissions", "API Settings"],
  [2, "kind of token", checks.expectJwt, "Set the Default Audience"],
  [7, "ID token", checks.tellIdToken, ""],
  [4, "OpenID Connect scopes", checks.compareScopes, "Put the Action into the flow", "OAUTH_SCOPES_MISMATCH"],
  [1, "refresh token", checks.refresh, "Switch Allow Offline Access on", "No refresh token"],
  ...tokenChecks(7),
];

const skip = (step: number, why: string): Check[] => [
  [step, "not checked", () => Promise.reject(new CannotTell(why)), ""],
];

/** Every check, in the order in which the steps fail in the field. */
const sections = ({ register, login, client }: Options, { id, secret }: Found): Section[] => [
  ["The server, from outside", SERVER],
  ["The tenant", TENANT],
  client ? ["A client that is there", GIVEN_CLIENT] : [
    "A client that registers itself",
    register ? NEW_CLIENT : skip(2, "npm run doctor -- --register creates one and looks"),
  ],
  [
    "A machine-to-machine token",
    id || secret ? MACHINE : skip(6, "AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET are not set"),
  ],
  ["A user's token", login ? USER : skip(7, "npm run doctor -- --login signs you in and looks")],
];

/** What `npm run setup` shows, in the doctor's words. */
async function lookInside(token: string, found: Found): Promise<Section> {
  const title = "The tenant's settings";
  try {
    const auth0 = new ManagementClient(found.issuer, token, delay, found.print);
    const { about, way, settings } = await plan(auth0, { serverUrl: found.serverUrl });
    found.way = way;
    const lines = await look(settings);
    return [
      `${title}. ${about}`,
      lines.map((line) => [
        line.step,
        line.what,
        () => {
          if (line.status === "ok") return line.found;
          throw new Error(line.status === "to do" ? `${line.found} → ${line.will}` : line.found);
        },
        line.status === "by hand" ? line.how : "npm run setup -- --apply does it",
      ]),
    ];
  } catch (error) {
    return [title, skip(1, describeError(error))];
  }
}

/** Leaves secrets out, whoever has quoted them, and terminal codes: words come from outside. */
function clean(text: string, secrets: Set<string>): string {
  const hidden = [...secrets].reduce((rest, secret) => rest.replaceAll(secret, "(hidden)"), text);
  return hidden.replace(/[^\P{Cc}\n]/gu, "?");
}

/** @returns The step that is missing, if one is. */
async function perform(
  [step, what, run, remedy, heading = `Step ${step}`]: Check,
  found: Found,
  token: Token,
) {
  function printCheck(status: string, step: number, text: string): void {
    found.print(`${status.padEnd(13)}Step ${step}  ${text.replaceAll("\n", `\n${" ".repeat(21)}`)}`);
  }
  try {
    printCheck("ok", step, `${what}: ${await run(found, token)}`);
  } catch (error) {
    const message = `${what}: ${error instanceof Error ? error.message : error}`;
    const said = clean(message, found.secrets).slice(0, 700); // in this order: no half of a secret is left
    if (error instanceof CannotTell) return printCheck("cannot tell", step, said);
    const cause = findCause(said, found);
    const [causingStep, mend, where] = cause ?? [step, remedy, heading];
    const [, named = causingStep] = /README Step (\d)/.exec(said) ?? []; // as auth.ts says it
    const known = cause ? mend : said;
    const earlier = found.causes.get(known) ?? found.causes.get(`Step ${named}`);
    if (earlier) return printCheck("cannot tell", Number(named), `${said}\nAs above at "${earlier}"`);
    found.causes.set(known, what);
    printCheck("missing", Number(named), `${said}\n${mend}. README, "${where}"`);
    return Number(named);
  }
}

/**
 * @param env AUTH0_DOMAIN and MCP_SERVER_URL as the server reads them, and what else `HELP` names.
 * @param print Takes a line, or several.
 * @param openBrowser Shows the user a page. Where it cannot, the URL that was printed has to do.
 * @returns The exit status.
 * @throws {Error} What is wrong with the environment, in the server's words.
 */
export async function doctor(
  env: Record<string, string | undefined>,
  { client, login = false, register = login }: Options,
  print: (text: string) => void,
  openBrowser: Found["openBrowser"],
): Promise<number> {
  const { AUTH0_CLIENT_ID: id, AUTH0_CLIENT_SECRET: secret } = env;
  const managementToken = env.AUTH0_MANAGEMENT_TOKEN?.trim();
  const { MCP_SERVER_URL: serverUrl, PORT: port, issuer } = readSettings(env);
  const found: Found = {
    serverUrl,
    port,
    issuer,
    id,
    secret,
    client,
    openBrowser,
    print: (text) => print(clean(text, found.secrets)),
    secrets: new Set(),
    causes: new Map(),
    state: randomUUID(),
  };
  hide(found, secret, managementToken);

  const missing: number[] = [];
  async function performAll([title, list]: Section): Promise<void> {
    found.print(`\n${title}`);
    const token: Token = {};
    for (const check of list) {
      const step = await perform(check, found, token);
      if (step !== undefined) missing.push(step);
    }
    await token.mcp?.close();
  }
  if (managementToken) {
    await performAll(await lookInside(managementToken, found));
    // All settings of these steps have been looked at: what is seen of them from outside has its cause among them.
    for (const step of missing) found.causes.set(`Step ${step}`, `Step ${step}`);
  }
  for (const section of sections({ register, login, client }, found)) await performAll(section);
  found.listener?.close();
  const [first] = missing;
  print(
    first === undefined
      ? "\nNothing is missing, as far as was checked."
      : `\n${missing.length} missing: start with Step ${first}.`,
  );
  return first === undefined ? 0 : 1;
}

/** A convenience: where there is no browser, the printed URL has to do. */
function openBrowser(url: string): void {
  const commands: Partial<Record<NodeJS.Platform, [string, ...string[]]>> = {
    darwin: ["open"],
    win32: ["rundll32", "url.dll,FileProtocolHandler"], // `start` is the shell's, which splits a URL at each `&`
  };
  const [command, ...args] = commands[process.platform] ?? ["xdg-open"];
  const browser = spawn(command, [...args, url], { stdio: "ignore", detached: true });
  browser.on("spawn", () => browser.unref());
  browser.on("error", () => {});
}

/** As the command line runs it. */
export async function main(args: string[], print: (text: string) => void): Promise<number> {
  const { values: { help, ...options } } = parseArgs({
    args,
    options: {
      register: { type: "boolean" },
      login: { type: "boolean" },
      client: { type: "string" },
      help: { type: "boolean" },
    },
  });
  if (help) {
    print(HELP);
    return 0;
  }
  const { env, differences } = readEnvironment();
  for (const line of differences) print(line);
  return await doctor(env, options, print, openBrowser);
}

if (isMain(import.meta.url)) await runCommand(() => main(process.argv.slice(2), console.log));
