/** `npm run doctor`: looks at the tenant and at the running server from outside, as `HELP` says. */
import { spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import type * as schemas from "@modelcontextprotocol/sdk/shared/auth.js";
import { type Print, readOptions, runCommand } from "../command.ts";
import { describeError, metadataUrl } from "../../../auth.ts";
import { readEnvironment, readSettings } from "../../../server.ts";
import * as checks from "./checks.ts";
import { CannotTell, type Check, either, Findings, type Given } from "./findings.ts";
import { plan } from "../setup/guide.ts";
import { ManagementClient } from "../setup/management-client.ts";
import { look } from "../setup/setup.ts";
import type { Way } from "../../support/tenant.ts";

const HELP = `Usage: npm run doctor -- [--register | --login | --client ID [--callback URL]]

Looks at the tenant and at the running server from outside, and names the step of the README that is missing.

  --register      register a client, which is a new application in the tenant, and go as far as the sign-in page
  --login         do that too, sign you in through your browser, and call the tools
  --client ID     register none: go to the sign-in page as a client that is there, either a fixed application
                  or a document of ChatGPT's (https://chatgpt.com/oauth/...)
  --callback URL  what ChatGPT's page shows as the callback of this fixed application: needed where Include Issuer in
                  Authorization Responses is off
  --help          show this

Reads the server's environment, and where they are set: AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET of Step 6, and
AUTH0_MANAGEMENT_TOKEN, with which it begins with what npm run setup shows.

Prints one line a check: ok, missing, or cannot tell where an earlier check failed or the answer does not show
from outside; and at the end what was not tried. Exits with 1 if something is missing. Tokens, codes and secrets are
never printed.`;

export interface Options {
  register?: boolean | undefined;
  login?: boolean | undefined;
  /** Id of a client that is there already: nothing is registered then. */
  client?: string | undefined;
  callback?: string | undefined;
}

type OpenBrowser = (url: string) => void | Promise<void>;

/** What every section needs. */
interface Target extends Pick<Findings, "check" | "print"> {
  serverUrl: string;
  issuer: string;
}

/** What the first sections have read from the server and the tenant. */
interface Discovered {
  answer: Given<Response>;
  resource: Given<schemas.OAuthProtectedResourceMetadata>;
  /** Only where its issuer is the expected one. */
  tenant: Given<schemas.OAuthMetadata>;
  keys: Given<unknown[]>;
}

const OOPS = "Oops!, something went wrong";
const AFTER_LOGIN = "401 after a good login";
const NO_TOOLS = "ChatGPT shows no tools, or old ones";

/** In the order in which the steps usually fail. */
const CHECKS = {
  server: ["0", "server", "Start the server and the tunnel"],
  https: ["0", "HTTPS", "ChatGPT calls from the internet: open a tunnel"],
  call: ["0", "call without a token", "Compare MCP_SERVER_URL with the running server's"],
  challenge: ["0", "challenge", "A proxy or another MCP_SERVER_URL changes it", "Deploy"],
  metadata: ["0", "metadata", "Route /.well-known/ to the server too", "Deploy"],
  metadataAtRoot: ["0", "metadata without the path", "Route /.well-known/ to the server too", "Deploy"],
  resource: ["0", "resource", "The server has another MCP_SERVER_URL: restart it"],
  tenant: ["0", "authorization server", "The server has another AUTH0_DOMAIN: restart it"],
  caches: ["0", "caches", "Switch caching off for this host", "Deploy"],
  cors: ["0", "Origin and CORS", "A proxy answers in the server's place", "Deploy"],
  bots: ["0", "bot rules", "Let both through", "403 from a bot rule"],

  discovery: ["0", "discovery", "Compare AUTH0_DOMAIN with the tenant's domain"],
  clock: ["0", "clock", "Set this machine's clock", AFTER_LOGIN],
  issuer: ["0", "issuer", "AUTH0_DOMAIN must be where users sign in", AFTER_LOGIN],
  pkce: ["0", "PKCE", "AUTH0_DOMAIN must lead to Auth0 itself"],
  keys: ["0", "signing keys", "The server must reach them, too", "503 Service Unavailable"],
  identification: ["2b", "issuer identification"],
  cimd: ["2b", "CIMD"],

  registration: ["2b", "registration", "Pass --client with yours, or switch it on"],
  kind: ["2b", "kind of client"],
  document: ["2b", "client", "Switch CIMD on, and copy the address from ChatGPT's page"],
  application: ["5", "client"],
  signInPage: ["3", "sign-in page", "Read Monitoring → Logs", OOPS],

  machineToken: ["6", "token", "Compare the two settings, and authorize the application for the API"],
  machineTokenKind: ["1", "kind of token", "Switch JSON Web Encryption (JWE) off", "API Settings"],

  signIn: ["3", "sign-in", "Read Monitoring → Logs", OOPS],
  answer: ["2b", "issuer of the answer", "Let proxies pass it on", "The answer names no issuer"],
  userToken: ["1", "token", "Set the Default Permissions", "API Settings"],
  userTokenKind: ["2", "kind of token", "Set the Default Audience"],
  idToken: ["7", "ID token"],
  scopes: ["4", "OpenID Connect scopes", "Put the Action into the flow", "OAUTH_SCOPES_MISMATCH"],
  refresh: ["1", "refresh token", "Switch Allow Offline Access on", "No refresh token"],

  claims: ["1", "claims", "Compare found and expected", AFTER_LOGIN],
  apiScopes: ["1", "scopes of the API", "Grant the permissions", "Permissions per tool"],
  initialize: ["0", "initialize", "The server says above what it expects", AFTER_LOGIN],
  tools: ["0", "tools/list", "Read the server's log", NO_TOOLS],
  profile: ["0", "get_profile", "Read the server's log", NO_TOOLS],
} satisfies Record<string, Check>;

/** Shows what `npm run setup` shows, as checks. Gives the tenant's way. */
async function checkSettings(findings: Findings, serverUrl: string, issuer: string, token: string) {
  const { check, print } = findings;
  try {
    const { about, way, settings } = await plan(new ManagementClient(issuer, token, delay, print), { serverUrl });
    const lines = await look(settings);
    print(`\nThe tenant's settings. ${about}`);
    for (const line of lines) {
      const remedy = line.status === "by hand" ? line.how : "npm run setup -- --apply does it";
      await check([line.step, line.what, remedy], () => {
        if (line.status === "ok") return line.found;
        throw new Error(line.status === "to do" ? `${line.found} → ${line.will}` : line.found);
      });
    }
    findings.explainByWhatIsMissing();
    return way;
  } catch (error) {
    print("\nThe tenant's settings");
    await check(["1", "not checked"], () => Promise.reject(new CannotTell(describeError(error))));
    return undefined;
  }
}

async function checkServer({ check, print, serverUrl, issuer }: Target, port: number) {
  print("\nThe server, from outside");
  const answer = await check(CHECKS.server, () => checks.reachServer(serverUrl, port));
  await check(CHECKS.https, () => checks.expectHttps(serverUrl, issuer));
  const refusal = await check(CHECKS.call, () => checks.expect401(answer()));
  await check(CHECKS.challenge, () => checks.readChallenge(refusal(), serverUrl));
  const url = metadataUrl(serverUrl);
  const urlAtRoot = url.slice(0, -new URL(serverUrl).pathname.length);
  const atPath = await check(CHECKS.metadata, () => answer() && checks.readMetadata(url));
  const atRoot = await check(CHECKS.metadataAtRoot, () => answer() && checks.readMetadata(urlAtRoot));
  const resource = either(atPath, atRoot);
  await check(CHECKS.resource, () => checks.compare(resource().resource, serverUrl));
  await check(CHECKS.tenant, () => checks.compare(resource().authorization_servers?.join(" "), issuer));
  await check(CHECKS.caches, () => resource() && checks.expectNoCache(serverUrl));
  await check(CHECKS.cors, () => refusal() && checks.callAsBrowser(serverUrl));
  await check(CHECKS.bots, () => refusal() && checks.callAsHosts(serverUrl));
  return { answer, resource };
}

async function checkTenant({ check, print, issuer }: Target, resource: Discovered["resource"]) {
  print("\nThe tenant");
  const found = await check(CHECKS.discovery, () => checks.readDiscovery(issuer));
  await check(CHECKS.clock, () => found() && checks.compareClock(issuer));
  const tenant = await check(CHECKS.issuer, () => checks.compareIssuer(found(), issuer));
  await check(CHECKS.pkce, () => checks.expectS256(tenant()));
  const keys = await check(CHECKS.keys, () => tenant() && checks.readSigningKeys(issuer));
  await check(CHECKS.identification, () => checks.tellIssuerIdentification(tenant(), resource()));
  await check(CHECKS.cimd, () => checks.tellCimd(tenant(), resource()));
  return { tenant, keys };
}

async function checkGivenClient(target: Target, found: Discovered, id: string, callback?: string) {
  const { check, print } = target;
  const { tenant, resource } = found;
  print("\nA client that is there");
  const client = URL.canParse(id)
    ? await check(CHECKS.document, () => checks.useDocument(id, tenant()))
    : await check(CHECKS.application, () => checks.useApplication(id, callback, tenant(), resource()));
  await checkSignInPage(target, found, client, randomUUID());
}

function checkSignInPage(target: Target, found: Discovered, client: Given<checks.TenantClient>, state: string) {
  return target.check(CHECKS.signInPage, () => {
    const scope = checks.scopesToAskFor(found.tenant(), found.resource()).join(" ");
    return checks.openSignInPage(found.tenant(), client(), { scope, state, resource: target.serverUrl });
  });
}

/** @param openBrowser Without it nobody is signed in. */
async function checkNewClient(target: Target, found: Discovered, way?: Way, openBrowser?: OpenBrowser) {
  const { check, print, serverUrl: resource } = target;
  const { tenant } = found;
  print("\nA client that registers itself");
  const state = randomUUID();
  const listener = await checks.listenForAnswer(state);
  const client = await check(CHECKS.registration, () => checks.registerClient(tenant(), listener.url, way));
  await check(CHECKS.kind, () => checks.tellKind(client()));
  const page = await checkSignInPage(target, found, client, state);
  if (openBrowser) {
    print("\nA user's token");
    const answer = await check(CHECKS.signIn, () => checks.signIn(page(), listener.query, openBrowser, print));
    const code = await check(CHECKS.answer, () => checks.compareAnswer(answer(), tenant()));
    const tokens = await check(CHECKS.userToken, () => {
      const request = { authorizationCode: code(), codeVerifier: page().codeVerifier, resource };
      return checks.exchangeCode(tenant(), client(), request);
    });
    const jwt = await check(CHECKS.userTokenKind, () => checks.expectJwt(tokens()));
    await check(CHECKS.idToken, () => checks.tellIdToken(tokens()));
    await check(CHECKS.scopes, () => {
      return checks.compareScopes(tokens(), checks.scopesToAskFor(tenant(), found.resource()), tenant());
    });
    const renewed = await check(CHECKS.refresh, () => checks.refresh(tenant(), client(), tokens(), resource));
    await checkToken(target, found, () => jwt() && either(() => renewed().access_token, jwt)());
  }
  listener.close();
}

async function checkMachine(target: Target, found: Discovered, id?: string, secret?: string) {
  const { check, print, serverUrl, issuer } = target;
  print("\nA machine-to-machine token");
  const named = either(() => found.resource().authorization_servers?.[0] ?? issuer, () => issuer);
  const tokens = await check(CHECKS.machineToken, () => {
    const tenant = found.tenant();
    if (named() === issuer) return checks.requestToken(tenant, id, secret, serverUrl);
    throw new CannotTell("not checked: the server names another tenant, and the secret may be meant for that one");
  });
  const jwt = await check(CHECKS.machineTokenKind, () => checks.expectJwt(tokens()));
  await checkToken(target, found, jwt);
}

/** Checks a token as the server does, and calls the tools with it. */
async function checkToken({ check, serverUrl, issuer }: Target, found: Discovered, jwt: Given<string>) {
  const { tenant, resource, keys, answer } = found;
  const caller = await check(CHECKS.claims, () => keys() && checks.verifyClaims(jwt(), issuer, serverUrl));
  await check(CHECKS.apiScopes, () => checks.expectApiScopes(caller(), resource(), tenant()));
  const client = await check(CHECKS.initialize, () => answer() && caller() && checks.initialize(serverUrl, jwt()));
  await check(CHECKS.tools, () => checks.listTools(client()));
  await check(CHECKS.profile, () => checks.getProfile(client()));
}

/**
 * @param env AUTH0_DOMAIN and MCP_SERVER_URL as the server reads them, and what else `HELP` names.
 * @param openBrowser Shows the user a page. Where it cannot, the user opens the printed URL.
 * @returns The exit status.
 * @throws {Error} What is wrong with the environment, in the server's words.
 */
export async function doctor(
  env: Record<string, string | undefined>,
  { client, callback, login = false, register = login }: Options,
  print: Print,
  openBrowser: OpenBrowser,
): Promise<number> {
  if (client !== undefined && register) throw new Error("--client goes with neither --register nor --login");
  if (callback !== undefined && client === undefined) throw new Error("--callback goes with --client");
  const { AUTH0_CLIENT_ID: id, AUTH0_CLIENT_SECRET: secret } = env;
  const managementToken = env.AUTH0_MANAGEMENT_TOKEN?.trim();
  const { MCP_SERVER_URL: serverUrl, PORT: port, issuer } = readSettings(env);
  const findings = new Findings(serverUrl, print);
  findings.hide(secret, managementToken);
  const target = { ...findings, serverUrl, issuer };

  const way = managementToken ? await checkSettings(findings, serverUrl, issuer, managementToken) : undefined;
  const server = await checkServer(target, port);
  const found = { ...server, ...await checkTenant(target, server.resource) };
  if (client !== undefined) await checkGivenClient(target, found, client, callback);
  else if (register) await checkNewClient(target, found, way, login ? openBrowser : undefined);
  if (id || secret) await checkMachine(target, found, id, secret);

  const [first] = findings.missing;
  print(
    first === undefined
      ? "\nNothing is missing, as far as was checked."
      : `\n${findings.missing.length} missing: start with Step ${first.step}.`,
  );
  const untried = [
    ...(register || client ? [] : ["the sign-in page (npm run doctor -- --register, or --client ID)"]),
    ...(client ? ["a sign-in as this client, which only ChatGPT can do"] : []),
    ...(client || login ? [] : ["a sign-in (npm run doctor -- --login)"]),
    ...(id || secret ? [] : ["a machine-to-machine token (AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET are not set)"]),
  ];
  if (untried.length > 0) print(`Not tried: ${untried.join(", ")}.`);
  return first === undefined ? 0 : 1;
}

/** Where there is no browser, the user opens the printed URL. */
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
export async function main(args: string[], print: Print): Promise<number> {
  const flag = { type: "boolean" } as const;
  const text = { type: "string" } as const;
  const options = readOptions(args, { register: flag, login: flag, client: text, callback: text }, HELP, print);
  return options ? await doctor(readEnvironment(), options, print, openBrowser) : 0;
}

await runCommand(import.meta.url, main);
